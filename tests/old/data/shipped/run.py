"""Classify an image with digits_cnn remove 0.75 bn_reestimate none torch: python run.py image.jpg"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image, ImageOps

from pq_sweep.removal import replay

here = Path(__file__).parent
image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("L")
width, height = (int(8 * side / min(image.size)) for side in image.size)
image = image.resize((width, height), Image.Resampling.BILINEAR)
left, top = round((width - 8) / 2), round((height - 8) / 2)
image = image.crop((left, top, left + 8, top + 8))
pixels = np.asarray(image, np.float32).reshape(8, 8, 1) / 255
batch = ((pixels - [0.0]) / [1.0]).transpose(2, 0, 1)[None].astype(np.float32)

model = instantiate(OmegaConf.load(here / "model.yaml"))
replay(model, json.loads((here / "pruning.json").read_text()))
model.module.load_state_dict(torch.load(here / "model.pt", map_location="cpu", weights_only=True))
network = model.module.to(torch.float32).eval()
with torch.inference_mode():
    logits = network(torch.from_numpy(batch).to(torch.float32)).float().numpy()[0]

labels = (here / "labels.txt").read_text().splitlines()
for index in logits.argsort()[::-1][:5]:
    print(f"{logits[index]:.4f} {labels[index]}")
