"""Runtimes: each opens a Session that runs a model on the device asked for, or refuses to.

A runtime lists the precisions that it realises on each kind of device, so that combinations that cannot exist are
refused before anything is loaded. Creating a runtime checks its options and loads nothing; frameworks are imported when
a session is opened.
"""

from pq_sweep.runtimes.auto import Auto
from pq_sweep.runtimes.cuda import use_tf32
from pq_sweep.runtimes.eager import Torch, converting, inferring
from pq_sweep.runtimes.graph import RuntimeMismatch, make_graph, precision_of
from pq_sweep.runtimes.native import TensorRTNative
from pq_sweep.runtimes.ort import OnnxRuntime, library_error, ort_session
from pq_sweep.runtimes.rtx import TensorRTRTX
from pq_sweep.runtimes.session import CallSession
from pq_sweep.runtimes.tensorrt import TensorRT

__all__ = [
    "Auto",
    "CallSession",
    "OnnxRuntime",
    "RuntimeMismatch",
    "TensorRT",
    "TensorRTNative",
    "TensorRTRTX",
    "Torch",
    "converting",
    "inferring",
    "library_error",
    "make_graph",
    "ort_session",
    "precision_of",
    "use_tf32",
]
