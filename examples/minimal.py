"""The shortest use: a plain model, trained on whatever mesh there is.

python examples/minimal.py                                      one process
torchrun --nproc-per-node 2 examples/minimal.py                 two
"""

import os

import torch
from torch import nn

import autopar

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 10))
x, y = torch.randn(32, 64), torch.randint(0, 10, (32,))

mesh = int(os.environ.get("WORLD_SIZE", "1"))
pm = autopar.compile(model, mesh, example={"input": x, "target": y}, loss=nn.functional.cross_entropy)
optimizer = torch.optim.AdamW(pm.parameters(), lr=1e-3)
for step in range(20):
    loss = pm(x, target=y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 4 and os.environ.get("RANK", "0") == "0":
        print(f"step {step + 1}: loss {loss.item():.4f}")
