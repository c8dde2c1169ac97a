import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import fx, nn

from flipproof.running.tracing import Tracer


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("shift", torch.ones(2))

    def forward(self, x):
        return self.layer(x) + self.shift


class Asking(nn.Module):
    """While it is traced, another thread calls a network that it knows nothing of."""

    def __init__(self, ask):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.ask = ask

    def forward(self, x):
        thread = threading.Thread(target=self.ask)
        thread.start()
        thread.join()
        return torch.relu(self.layer(x))


def test_a_forward_of_another_thread_is_computed_and_not_traced():
    other, x, answers = Other(), torch.randn(4, 3), []
    model = Asking(lambda: answers.append(other(x)))
    graph = Tracer().trace(model)
    assert torch.equal(answers[0], other(x))
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "call_function", "output"]


def test_a_forward_of_another_thread_through_the_traced_model_itself():
    x, answers = torch.randn(4, 3), []
    model = Asking(lambda: answers.append(model.layer(x)))
    graph = Tracer().trace(model)
    assert torch.equal(answers[0], model.layer(x))
    assert len(graph.nodes) == 4


def test_traces_of_many_threads_leave_torch_as_it_was():
    call, read = nn.Module.__call__, nn.Module.__getattr__
    nets = [nn.Sequential(*(nn.Linear(3, 3) for _ in range(30))) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        graphs = list(pool.map(lambda net: Tracer().trace(net), nets * 5))
    assert nn.Module.__call__ is call
    assert nn.Module.__getattr__ is read
    x = torch.randn(2, 3)
    for net, graph in zip(nets * 5, graphs, strict=True):
        assert torch.equal(fx.GraphModule(net, graph)(x), net(x))
