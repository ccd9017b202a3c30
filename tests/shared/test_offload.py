"""Offload: the same results, and only so much on the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shared.errors import SettingError
from shared.offload import Placement, Weights, blocks_of, check_offload, tensor_bytes

WIDTH = 8
BLOCK_BYTES = (WIDTH * WIDTH + WIDTH) * 4


class Net(nn.Module):
    """A layer that stays, four blocks run in another order than they are defined, tied weights, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.part = nn.Module()
        self.part.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.last = nn.Linear(WIDTH, WIDTH)
        self.last.weight = self.first.weight
        self.register_buffer("shift", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i in (2, 0, 3, 1):
            x = self.part.blocks[i](x).tanh()
        return self.last(x) + self.shift


def forced(mode: str) -> Placement:
    """A placement that copies although the CPU computes."""
    placement = Placement("cpu")
    placement.mode = mode  # type: ignore[assignment]
    return placement


def there(waiting: dict[str, int], net: nn.Module) -> set[str]:
    """Names of the weights that copies stand in for."""
    return {name for name, x in net.state_dict().items() if x.data_ptr() != waiting[name]}


@pytest.mark.parametrize("mode", ["none", "model", "sequential"])
def test_results_are_the_same_and_weights_come_back(mode: str) -> None:
    net, x = Net(), torch.randn(3, WIDTH)
    wanted, waiting = net(x), {name: x.data_ptr() for name, x in net.state_dict().items()}
    placement = forced(mode)
    placement.place(net)
    with placement.computing(net) as device:
        assert device == torch.device("cpu")
        for _ in range(2):
            assert torch.equal(net(x), wanted)
    assert not there(waiting, net) and torch.equal(net(x), wanted)
    assert net.last.weight is net.first.weight
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in net.modules())


def test_what_is_on_the_device() -> None:
    net, seen = Net(), []
    waiting = {name: x.data_ptr() for name, x in net.state_dict().items()}
    for block in net.part.blocks:
        block.register_forward_hook(lambda *call: seen.append(there(waiting, net)))
    resident = {"first.weight", "first.bias", "last.weight", "last.bias", "shift"}
    placement = forced("sequential")
    with placement.computing(net):
        net(torch.randn(1, WIDTH))
    blocks = [{f"part.blocks.{i}.weight", f"part.blocks.{i}.bias"} for i in (2, 0, 3, 1)]
    assert seen == [resident | block for block in blocks]
    stays = BLOCK_BYTES + 2 * WIDTH * 4  # the tied matrix once, two biases, the buffer
    assert placement.peak_bytes == stays + BLOCK_BYTES
    whole = forced("model")
    with whole.computing(net):
        assert there(waiting, net) == waiting.keys()
    assert whole.peak_bytes == stays + 4 * BLOCK_BYTES == Weights.of([net]).nbytes


def test_a_failing_block_leaves_nothing_behind() -> None:
    net = Net()
    waiting = {name: x.data_ptr() for name, x in net.state_dict().items()}
    with pytest.raises(RuntimeError), forced("sequential").computing(net):
        net.part.blocks[1](torch.randn(1, WIDTH + 1))
    assert not there(waiting, net)


def test_weights_changed_between_visits_are_seen() -> None:
    """Adapters are put in after loading."""
    net, x, placement = Net(), torch.randn(1, WIDTH), forced("sequential")
    with placement.computing(net):
        before = net(x)
    net.part.blocks[0] = nn.Linear(WIDTH, WIDTH)
    with placement.computing(net):
        after = net(x)
    assert not torch.equal(before, after) and torch.equal(after, net(x))


def test_where_the_cpu_computes_nothing_is_copied() -> None:
    net = Net()
    pointers = [x.data_ptr() for x in net.parameters()]
    placement = Placement("cpu", "sequential")
    assert placement.mode == "none"
    with placement.computing(net):
        assert [x.data_ptr() for x in net.parameters()] == pointers


def test_blocks_are_the_items_of_outermost_lists() -> None:
    inner = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))
    outer = nn.ModuleDict({"a": nn.ModuleList([inner]), "b": nn.Sequential(nn.Linear(2, 2))})
    assert blocks_of(outer) == [inner]
    assert tensor_bytes(torch.zeros(3, dtype=torch.float16)) == 6


def test_for_items_that_are_not_called_stand_their_own() -> None:
    level, nested = nn.Module(), nn.ModuleList([nn.Linear(2, 2)])
    level.blocks, level.last = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.Linear(2, 2)
    net = nn.ModuleDict({"levels": nn.ModuleList([level, nested])})
    assert blocks_of(net) == [*level.blocks, *nested]


def test_an_unknown_mode_names_the_legal_ones() -> None:
    with pytest.raises(SettingError, match="unknown offload 'cpu'; legal: none, model, sequential, auto"):
        check_offload("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_cuda_holds_two_blocks_at_most(mode: str) -> None:
    width, count = 1024, 8
    net = nn.Module()
    net.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
    placement, x = Placement("cuda", mode), torch.randn(2, width)  # type: ignore[arg-type]
    placement.place(net)
    wanted = x
    for block in net.blocks:
        wanted = block(wanted)
    torch.cuda.reset_peak_memory_stats()
    with placement.computing(net) as device, torch.no_grad():
        got = x.to(device)
        for _ in range(3):
            got = x.to(device)
            for block in net.blocks:
                got = block(got)
    assert torch.allclose(got.cpu(), wanted, atol=1e-4)
    held = 3 if mode == "sequential" else count
    assert torch.cuda.max_memory_allocated() < (held + 0.5) * (width * width + width) * 4
    assert net.blocks[0].weight.is_pinned()
