"""What of steps by kernels only a CUDA device can show."""

import pytest
import torch
from torch import nn

from helpers.cases import CASES, GAP, Model, gradient
from helpers.kernels import Small
from lowrank_optim import DCTAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW
from lowrank_optim.settings.plans import plan_of


@pytest.mark.gpu
class TestOnADevice:
    """What only a CUDA device can show."""

    @pytest.mark.parametrize("length", ["published", "adamw"])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_no_step_waits_for_the_device(self, case, length):
        """The first step, refreshes and steps between; exact decompositions wait inside torch."""
        plan = plan_of(case.build(Model().parameters()).param_groups[0])
        if type(plan.projector).__name__ == "SVD":
            case = type(case)(case.name, case.factory, {**case.settings, "projector": "power"})
        if plan.on_refresh == "align":
            pytest.skip("aligning takes torch's svd, which waits for the device")
        if case.chooses:
            pytest.skip("the host waits for ranks that follow from gradients: they are shapes")
        model = Small(torch.bfloat16).cuda()
        rank = {**{"rank": 3}, **case.settings}["rank"]
        changes = {} if length == "published" else {"length": length}
        optimizer = case.build(model.groups(rank), **changes)
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2 * GAP + 1):
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("length", ["published", "adamw"])
    @pytest.mark.parametrize(
        "factory", [GaLoreAdamW, FiraAdamW, FrugalAdamW, DCTAdamW], ids=lambda f: f.__name__
    )
    def test_a_captured_step_replays_as_an_eager_one(self, factory, length):
        settings = {
            "rank": 3, "capturable": True, "projector": "power", "update_proj_gap": 100,
            "lr": torch.tensor(1e-2, device="cuda"), "stochastic_rounding": True,
            "length": length,
        }  # fmt: skip
        if factory is DCTAdamW:
            settings.pop("projector")
        models = [Small(torch.bfloat16).cuda() for _ in range(2)]
        eager, captured = (factory(m.parameters(), **settings) for m in models)
        for model in models:
            for position, param in enumerate(model.parameters()):
                param.grad = gradient(param.cpu(), 0, position).cuda()
        for _ in range(3):
            eager.step()
            captured.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.step()
        for step in range(5):
            for model in models:
                for position, param in enumerate(model.parameters()):
                    param.grad.copy_(gradient(param.cpu(), step, position))
            eager.step()
            graph.replay()
        for left, right in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(left, right)

    def test_a_step_needs_little_memory(self):
        params = [nn.Parameter(torch.randn(2048, 2048, device="cuda").bfloat16()) for _ in range(8)]
        optimizer = FiraAdamW(params, rank=256, projector="power", update_proj_gap=10)
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        assert torch.cuda.max_memory_allocated() - before <= 64 << 20

    def test_schedules_do_not_recompile(self):
        from lowrank_optim.kernels.lift import _lift
        from lowrank_optim.kernels.project import _project

        param = nn.Parameter(torch.randn(64, 48, device="cuda").bfloat16())
        optimizer = FiraAdamW([param], rank=16)
        param.grad = torch.randn_like(param)
        optimizer.step()
        sizes = [len(kernel.device_caches[0][0]) for kernel in (_project, _lift)]
        for step in range(1, 20):
            group = optimizer.param_groups[0]
            group["lr"], group["betas"] = 1e-3 / step, (0.9, 1 - 1e-3 / step)
            group["weight_decay"], group["eps"] = 0.01 * step, 1e-8 * step
            optimizer.step()
        assert [len(kernel.device_caches[0][0]) for kernel in (_project, _lift)] == sizes
