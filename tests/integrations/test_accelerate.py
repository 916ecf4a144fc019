"""accelerate: dropout, devices, copies, restoring and reports."""

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import nn

import pyvit
from tests.integrations.checks import made
from tests.integrations.models import MODELS
from tests.models.parity import relative_error


def fresh(name):
    model, run = made(name)
    return copy.deepcopy(model), run


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", MODELS)
def test_identities_in_the_place_of_dropouts(name, when):
    model, run = fresh(name)
    if when == "after":
        pyvit.accelerate(model)
    for module in list(model.modules()):
        for child, found in list(module.named_children()):
            if type(found) is nn.Dropout:
                setattr(module, child, nn.Identity())
    if when == "before":
        pyvit.accelerate(model)
    with torch.no_grad():
        found = run(model)
        pyvit.restore(model)
        assert relative_error(found, run(model)) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_dropouts_that_are_on_in_evaluation(name):
    """Monte Carlo dropout: after ``model.eval()``, each dropout in training mode draws random numbers or not, as in the
    original."""
    model, run = fresh(name)
    paths = [path for path, module in model.named_modules() if type(module) is nn.Dropout]
    with torch.no_grad():
        for path in paths:
            drop = model.get_submodule(path)
            drop.p, drop.training = 0.5, True
            draws = []
            for accelerated in (False, True):
                if accelerated:
                    pyvit.accelerate(model)
                draws.append(not torch.equal(run(model), run(model)))
            pyvit.restore(model)
            drop.training = False
            assert draws[0] == draws[1], path


@pytest.mark.parametrize("name", MODELS)
def test_dropout_of_everything(name):
    model, run = fresh(name)
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = 1.0
        for attribute in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 1.0)
        if isinstance(getattr(module, "drop_prob", None), float):
            module.drop_prob = 0.0  # stochastic depth would draw other numbers
    model.train()
    expected = run(model)
    pyvit.accelerate(model)
    assert relative_error(run(model), expected) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_devices_and_dtypes_without_kernels(name):
    model, run = fresh(name)
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = run(double)
        pyvit.accelerate(double)
        assert torch.equal(run(double), expected)  # of the original code
        pyvit.accelerate(model)
        meta = run(model.to("meta"))
        assert meta.is_meta
        assert meta.shape == expected.shape


@pytest.mark.parametrize("name", MODELS)
def test_copies(name):
    model, run = fresh(name)
    with torch.no_grad():
        original = run(model)
        pyvit.accelerate(model)
        expected = run(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
            assert torch.equal(run(other), expected)
            for _ in range(2):
                pyvit.restore(other)
                assert torch.equal(run(other), original)
            assert torch.equal(run(model), expected)
        pyvit.accelerate(model)
        assert torch.equal(run(model), expected)


def _wrapped_by_a_partial(module):
    module._old_forward = module.forward
    module.forward = functools.partial(lambda m, *args, **kwargs: m._old_forward(*args, **kwargs), module)


def _wrapped_by_a_closure(module):
    old = module.forward
    module.forward = lambda *args, **kwargs: old(*args, **kwargs)


@pytest.mark.parametrize("wrap", [_wrapped_by_a_partial, _wrapped_by_a_closure])
@pytest.mark.parametrize("name", MODELS)
def test_restore_under_wrappers_of_other_libraries(name, wrap):
    model, run = fresh(name)
    with torch.no_grad():
        original = run(model)
        pyvit.accelerate(model)
        expected = run(model)
        for module in model.modules():
            if not isinstance(module, nn.ModuleList):
                wrap(module)
        assert relative_error(run(model), original) < 1e-4
        pyvit.restore(model)
        assert torch.equal(run(model), original)
        assert not torch.equal(expected, original)
        pyvit.accelerate(model)
        assert relative_error(run(model), original) < 1e-4


def test_undone_under_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model, _ = fresh("timm vit")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(images)
        pyvit.accelerate(model)
        accelerate.cpu_offload(model, execution_device="cpu")
        assert relative_error(model(images), expected) < 1e-4
        pyvit.restore(model)
        assert relative_error(model(images), expected) < 1e-4


@pytest.mark.parametrize("wrapped", ["before", "after"])
def test_within_a_compiled_model(wrapped):
    model, run = fresh("timm vit")
    with torch.no_grad():
        original = run(model)
        compiled = torch.compile(model, backend="eager") if wrapped == "before" else None
        if compiled is not None:
            assert relative_error(run(compiled), original) < 1e-4
        pyvit.accelerate(model if compiled is None else compiled)
        compiled = torch.compile(model, backend="eager") if compiled is None else compiled
        assert relative_error(run(compiled), original) < 1e-4
        assert not torch.equal(run(compiled), original)
        pyvit.restore(compiled)
        assert relative_error(run(compiled), original) < 1e-5
        assert torch.equal(run(model), original)


def test_a_report_says_what_came_after():
    model, _ = fresh("timm swin")
    report = pyvit.accelerate(model, strict=True)
    assert not report.refresh().left
    assert report.refresh().replaced == report.replaced
    attn = model.layers[0].blocks[0].attn
    handle = attn.register_forward_hook(lambda *_: None)
    assert [row.note for row in report.refresh().left] == [
        "a hook watches its attn: the original runs for as long as it does"
    ]
    handle.remove()
    attn.forward = lambda x, mask=None: x
    assert [(row.path, row.note) for row in report.refresh().left] == [
        ("layers.0.blocks.0", "its attn has methods that are replaced on this instance")
    ]
    del attn.forward
    assert not report.refresh().left
    attn.register_forward_hook(lambda *_: None)
    report = pyvit.accelerate(model, strict=True)  # the user's own code runs, and is no failure
    assert [(row.note.partition(":")[0], row.users) for row in report.left] == [("a hook watches its attn", True)]


GRIDS = [(batch, grid) for grid in [(4, 4), (1, 4), (4, 1), (1, 1), (2, 3)] for batch in (1, 2)]
LAYERS = ["batch norm", "group norm", "convolution", "depthwise"]


@pytest.mark.parametrize(
    ("behind", "batch", "grid"),
    [
        (behind, *at) for behind in LAYERS for at in GRIDS if (behind, *at) != ("batch norm", 1, (1, 1))
    ],  # one value per channel
    ids=str,
)
def test_maps_have_strides_that_torch_reads_rightly(behind, batch, grid):
    layers = {
        "batch norm": nn.BatchNorm2d(8),
        "group norm": nn.GroupNorm(2, 8),
        "convolution": nn.Conv2d(8, 5, 3, padding=1),
        "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8),
    }
    exact = nn.Sequential(nn.Conv2d(3, 8, 4, 4), layers[behind]).double()
    model = copy.deepcopy(exact).float()

    class PatchEmbed(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = model[0]

    from pyvit.integrations.common import patch_conv
    from pyvit.integrations.forwards import Forward, put

    (item,) = patch_conv("proj")(PatchEmbed())
    put(Forward(item))
    images = torch.randn(batch, 3, 4 * grid[0], 4 * grid[1], requires_grad=True)
    target = torch.randn_like(model(images))
    model.zero_grad()
    _check_gradients(model, exact, images, target)


def _check_gradients(model, exact, images, target):
    double = images.detach().double().requires_grad_()
    found = torch.autograd.grad((model(images) * target).sum(), [images, *model.parameters()])
    expected = torch.autograd.grad((exact(double) * target.double()).sum(), [double, *exact.parameters()])
    scale = max(float(g.abs().max()) for g in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-5 * scale


@pytest.mark.parametrize(
    ("batch", "size"), [(1, (32, 32)), (1, (8, 32)), (2, (32, 32)), (2, (8, 32)), (2, (8, 8))], ids=str
)
def test_maps_of_intermediate_layers_have_such_strides(batch, size):
    config = {"img_size": size, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    vit = pyvit.create_model("vit_tiny_patch16_224", **config)
    norm = nn.BatchNorm2d(24)
    images = torch.randn(batch, 3, *size)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        model, bn = copy.deepcopy(vit).to(dtype), copy.deepcopy(norm).to(dtype)
        (map_,) = model.get_intermediate_layers(images.to(dtype), reshape=True)
        out = bn(map_)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)).sum().backward()
        gradients.append(model.blocks[0].mlp.fc2.weight.grad)
    assert relative_error(gradients[0], gradients[1].float()) < 1e-2  # misread strides: 1
