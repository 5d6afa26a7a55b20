"""The options of ONNX Runtime's GPU providers by their documented names.

Read in November 2026 in microsoft/onnxruntime. Each list is a page of the documentation and, for what is newer than
that page, the commented header beside it:

- TensorRT: docs/execution-providers/TensorRT-ExecutionProvider.md at 766400b4 (onnxruntime.ai, section Configurations)
  and include/onnxruntime/core/providers/tensorrt/tensorrt_provider_options.h at 04d859ac. `trt_bf16_enable` came later
  and is explained in the README of the same provider as a plug-in.
- CUDA: docs/execution-providers/CUDA-ExecutionProvider.md at d0ea319e (onnxruntime.ai, section Configuration Options)
  and include/onnxruntime/core/providers/cuda/cuda_provider_options.h at 0689b467.

Options that are pointers to memory are left out, since Python cannot give them. tests/test_gpu_wheel.py compares the
names and versions with the published packages.
"""

from __future__ import annotations

# By provider, each option with the first version of onnxruntime-gpu that has it; "" where 1.20 has it already.
DOCUMENTED: dict[str, dict[str, str]] = {
    "TensorrtExecutionProvider": {
        "device_id": "",
        "trt_auxiliary_streams": "",
        "trt_bf16_enable": "1.23",
        "trt_build_heuristics_enable": "",
        "trt_builder_optimization_level": "",
        "trt_context_memory_sharing_enable": "",
        "trt_cuda_graph_enable": "",
        "trt_detailed_build_log": "",
        "trt_dla_core": "",
        "trt_dla_enable": "",
        "trt_dump_ep_context_model": "",
        "trt_dump_subgraphs": "",
        "trt_engine_cache_enable": "",
        "trt_engine_cache_path": "",
        "trt_engine_cache_prefix": "",
        "trt_engine_decryption_enable": "",
        "trt_engine_decryption_lib_path": "",
        "trt_engine_hw_compatible": "",
        "trt_ep_context_embed_mode": "",
        "trt_ep_context_file_path": "",
        "trt_extra_plugin_lib_paths": "",
        "trt_force_sequential_engine_build": "",
        "trt_force_timing_cache": "",
        "trt_fp16_enable": "",
        "trt_int8_calibration_table_name": "",
        "trt_int8_enable": "",
        "trt_int8_use_native_calibration_table": "",
        "trt_layer_norm_fp32_fallback": "",
        "trt_max_partition_iterations": "",
        "trt_max_workspace_size": "",
        "trt_min_subgraph_size": "",
        "trt_onnx_model_folder_path": "",
        "trt_op_types_to_exclude": "1.21",
        "trt_profile_max_shapes": "",
        "trt_profile_min_shapes": "",
        "trt_profile_opt_shapes": "",
        "trt_sparsity_enable": "",
        "trt_tactic_sources": "",
        "trt_timing_cache_enable": "",
        "trt_timing_cache_path": "",
        "trt_weight_stripped_engine_enable": "",
        "user_compute_stream": "",
    },
    "CUDAExecutionProvider": {
        "arena_extend_strategy": "",
        "cudnn_conv1d_pad_to_nc1d": "",
        "cudnn_conv_algo_search": "",
        "cudnn_conv_use_max_workspace": "",
        "device_id": "",
        "do_copy_in_default_stream": "",
        "enable_cuda_graph": "",
        "enable_skip_layer_norm_strict_mode": "",
        "gpu_mem_limit": "",
        "prefer_nhwc": "",
        "tunable_op_enable": "",
        "tunable_op_max_tuning_duration_ms": "",
        "tunable_op_tuning_enable": "",
        "use_ep_level_unified_stream": "",
        "use_tf32": "",
        "user_compute_stream": "",
    },
}
