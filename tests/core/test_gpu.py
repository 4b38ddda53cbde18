"""Claims about a GPU: UNCLIP_TEST_GPU=1 python -m pytest tests/core/test_gpu.py

Everywhere else these tests are skipped, and GPUs are hidden from all others (see conftest.py).
"""

import pytest
import torch
from torch.testing import assert_close

from diffusion import SeededNoise
from support.tools import autocast
from test_every_stage import STAGES, conditions, make, training_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def on_gpu(x):
    return {k: v.cuda() for k, v in x.items()} if isinstance(x, dict) else x.cuda()


@pytest.mark.parametrize("stage", STAGES)
def test_a_gpu_draws_what_a_cpu_draws(stage):
    model, (given, settings) = make(stage), conditions(stage)
    expected = model.sample(*given, **settings, noise=SeededNoise([1, 2, 3]))
    drawn = model.cuda().sample(*map(on_gpu, given), **settings, noise=SeededNoise([1, 2, 3]))
    assert_close(drawn.cpu(), expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_a_gpu_has_the_cpus_loss_and_gradients_and_bf16_is_near(stage, monkeypatch):
    """The noise and the noise levels come from the CPU, for both."""
    for name in ("randn_like", "randint", "rand"):
        draw = getattr(torch, name)

        def on_cpu(*args, draw=draw, device=None, **settings):
            args = [x.cpu() if torch.is_tensor(x) else x for x in args]
            return draw(*args, **settings).to(device or where)

        monkeypatch.setattr(torch, name, on_cpu)
    found = []
    for where, fast in (("cpu", False), ("cuda", False), ("cuda", True)):
        torch.manual_seed(0)
        model, batch = make(stage).to(where), training_batch()
        torch.manual_seed(1)
        with torch.autocast("cuda", torch.bfloat16, enabled=fast):
            loss = model.loss({k: v.to(where) for k, v in batch.items()})
        loss.backward()
        grads = torch.cat([p.grad.flatten().cpu() for p in model.parameters()
                           if p.grad is not None])
        found.append((loss.item(), grads))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    assert_close(found[1][1], found[0][1], rtol=1e-2, atol=1e-3 * found[0][1].abs().max().item())
    assert found[2][0] == pytest.approx(found[0][0], rel=0.05) and found[2][1].isfinite().all()


def test_bf16_is_used_where_the_gpu_multiplies_it_fast():
    assert autocast("cuda")._enabled == (torch.cuda.get_device_capability() >= (8, 0))
