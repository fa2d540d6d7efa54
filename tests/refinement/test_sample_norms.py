"""Per-sample gradient norms against torch's own per-sample gradients."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from lightning_neuro.refinement import position_sums as norms
from lightning_neuro.refinement.convolution_norms import possible_forms
from lightning_neuro.refinement.patches import padded, patches_of
from lightning_neuro.refinement.sample_norms import gradient_norms

LAYERS = {
    "linear": (nn.Linear(7, 5), (7,)),
    "linear no bias": (nn.Linear(7, 5, bias=False), (7,)),
    "tokens, Gram": (nn.Linear(40, 30), (3, 40)),
    "tokens, materialised": (nn.Linear(6, 4), (20, 6)),
    "grid of tokens": (nn.Linear(6, 4, bias=False), (2, 3, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=2, dilation=2, groups=2), (4, 11)),
    "conv2d": (nn.Conv2d(2, 3, 3, padding=1), (2, 6, 5)),
    "conv2d stride": (nn.Conv2d(2, 3, (3, 2), stride=(2, 3), padding=(1, 0), bias=False), (2, 7, 8)),
    "conv2d 1x1 stride": (nn.Conv2d(4, 5, 1, stride=2), (4, 5, 5)),
    "conv2d depthwise": (nn.Conv2d(4, 8, 3, groups=4), (4, 5, 5)),
    "conv2d same": (nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(2, 1)), (2, 8, 6)),
    "conv2d valid": (nn.Conv2d(2, 3, 3, padding="valid"), (2, 6, 6)),
    "conv2d circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "conv2d reflect": (nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect"), (2, 5, 5)),
    "conv2d same replicate": (nn.Conv2d(2, 3, 4, padding="same", padding_mode="replicate"), (2, 5, 5)),
    "conv2d Gram": (nn.Conv2d(16, 24, 3), (16, 4, 4)),
    "conv2d Gram groups": (nn.Conv2d(32, 32, 3, groups=2), (32, 4, 4)),
    "conv3d": (nn.Conv3d(2, 3, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0)), (2, 3, 5, 4)),
    "conv2d rows with groups": (nn.Conv2d(4, 6, (3, 2), padding=(2, 1), dilation=(1, 3), groups=2), (4, 9, 7)),
    "one pixel left": (nn.Conv2d(3, 4, 5, stride=3, padding=1), (3, 4, 4)),
}


def batch(module: nn.Module, shape: tuple[int, ...], samples: int = 4, dtype: torch.dtype = torch.float64):
    """Inputs, output gradients and the truth: the norm of vmap(grad) of sum(output x gradient)."""
    generator = torch.Generator().manual_seed(0)
    module = module.to(torch.float64)
    inputs = torch.randn(samples, *shape, generator=generator, dtype=torch.float64).to(dtype)
    gradients = torch.randn(module(inputs.double()).shape, generator=generator, dtype=torch.float64).to(dtype)
    gradients = gradients * torch.arange(samples).to(dtype).reshape(-1, *[1] * (gradients.ndim - 1))

    def loss(parameters, x, d):
        return (functional_call(module, parameters, (x[None],))[0] * d).sum()

    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs.double(), gradients.double())
    truth = sum(part.flatten(1).square().sum(1) for part in per_sample.values()).sqrt()
    return inputs, gradients, truth


@pytest.mark.parametrize("name", LAYERS)
def test_against_vmap_of_grad(name):
    module, shape = LAYERS[name]
    inputs, gradients, truth = batch(module, shape)
    found = gradient_norms(module, inputs, gradients)
    assert found.dtype == torch.float64
    assert torch.allclose(found, truth, rtol=1e-10, atol=1e-10)
    assert found[0] == 0 and (found[1:] > 0.1).all()


@pytest.mark.parametrize("name", ["conv1d", "conv2d Gram groups", "tokens, materialised", "tokens, Gram"])
@pytest.mark.parametrize("limit", [1, 5000])
def test_chunks_change_nothing(name, limit, monkeypatch):
    module, shape = LAYERS[name]
    inputs, gradients, truth = batch(module, shape, samples=5)
    monkeypatch.setattr(norms, "CPU_CHUNK_BYTES", limit)
    assert torch.allclose(gradient_norms(module, inputs, gradients), truth, rtol=1e-10)


@pytest.mark.parametrize("name", ["conv2d", "conv2d Gram", "conv2d depthwise", "tokens, Gram"])
@pytest.mark.parametrize("gram", [True, False])
def test_both_forms_agree(name, gram, monkeypatch):
    module, shape = LAYERS[name]
    inputs, gradients, truth = batch(module, shape)
    monkeypatch.setattr(norms, "gram_is_cheaper", lambda *_: gram)
    assert torch.allclose(gradient_norms(module, inputs, gradients), truth, rtol=1e-10)


CASES = {
    # 3 x 3 convolutions as in ResNet-18 at 32 x 32: channels, side, stride -> the form that was measured to be best.
    "64 channels": (64, 64, 32, 1, "_by_rows"),
    "128 channels": (128, 128, 16, 1, "_by_pixels"),
    "256 channels": (256, 256, 8, 1, "_by_pixels"),
    "512 channels": (512, 512, 4, 1, "_by_pixels"),
    "one input channel": (1, 64, 32, 1, "_by_patches"),
    "stride": (128, 256, 16, 2, "_by_patches"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_fastest_form_is_taken(name):
    channels, out, side, stride, expected = CASES[name]
    module = nn.Conv2d(channels, out, 3, stride, padding=1, device="meta")
    inputs = torch.empty(1, channels, side, side, device="meta")
    forms = possible_forms(module, inputs, module(inputs))
    assert min(forms, key=lambda form: form.cost).squares.__name__ == expected


def test_the_gram_form_is_taken_for_few_positions():
    assert norms.gram_is_cheaper(10, 10, 5) and not norms.gram_is_cheaper(10, 10, 6)


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith(("conv", "one pixel"))])
def test_all_forms_of_a_convolution_agree(name):
    module, shape = LAYERS[name]
    inputs, gradients, truth = batch(module, shape)
    forms = possible_forms(module, inputs, gradients)
    assert len(forms) == 1 or all(stride == 1 for stride in module.stride)
    for form in forms:
        squares = form.squares(module, padded(module, inputs), gradients)
        if module.bias is not None:
            squares = squares + gradients.flatten(2).sum(2).square().sum(1)
        assert torch.allclose(squares.sqrt(), truth, rtol=1e-10), form.squares.__name__


def test_all_forms_are_tested():
    names = set()
    for module, shape in (LAYERS["conv2d"], LAYERS["conv2d rows with groups"]):
        names |= {form.squares.__name__ for form in possible_forms(module, *batch(module, shape)[:2])}
    assert names == {"_by_patches", "_by_pixels", "_by_rows"}


def test_half_precision_is_never_interpolated():
    module, shape = LAYERS["conv2d"]
    inputs, gradients, _ = batch(module, shape, dtype=torch.float16)
    assert "_by_rows" not in {form.squares.__name__ for form in possible_forms(module, inputs, gradients)}


def test_a_loop_of_backward_passes_through_a_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(100, 3))
    x, y = torch.randn(6, 1, 5, 5), torch.arange(6) % 3
    seen = {}

    def tap(module, inputs, output):
        output.register_hook(lambda gradient, x=inputs[0]: seen.update({module: (x.detach(), gradient)}))

    handles = [net[i].register_forward_hook(tap) for i in (0, 3)]
    nn.functional.cross_entropy(net(x), y).backward()
    for handle in handles:
        handle.remove()
    for module in (net[0], net[3]):
        truth = []
        for i in range(6):
            net.zero_grad()
            (nn.functional.cross_entropy(net(x[i : i + 1]), y[i : i + 1]) / 6).backward()
            truth.append(torch.cat([p.grad.flatten() for p in module.parameters()]).norm())
        assert torch.allclose(gradient_norms(module, *seen[module]), torch.stack(truth), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["linear", "tokens, Gram", "tokens, materialised", "conv2d", "conv2d Gram"])
def test_lower_precision(name, dtype):
    module, shape = LAYERS[name]
    inputs, gradients, truth = batch(module, shape, dtype=dtype)
    found = gradient_norms(module.to(dtype), inputs, gradients)
    assert found.dtype == torch.float32
    rounding = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    assert torch.allclose(found.double(), truth, rtol=rounding)


def test_inputs_of_another_dtype_than_the_layer_ran_in():
    inputs, gradients, truth = batch(nn.Linear(7, 5), (7,))
    found = gradient_norms(nn.Linear(7, 5), inputs.float(), gradients.bfloat16())
    assert torch.allclose(found.double(), truth, rtol=1e-2)


def test_squares_do_not_overflow_in_half_precision():
    inputs = torch.full((1, 400), 60.0, dtype=torch.float16)  # |a|^2 = 1,440,000 > 65,504
    gradients = torch.ones(1, 1, dtype=torch.float16)
    assert gradient_norms(nn.Linear(400, 1, bias=False), inputs, gradients).item() == pytest.approx(1200.0)


def test_samples_that_cancel_are_nearly_zero_and_not_nan():
    # The second position takes back what the first adds, up to rounding, whose sign is as it happens.
    noise = torch.randn(4, 200, 50, generator=torch.Generator().manual_seed(0))
    inputs = torch.stack([noise[0], noise[0] + 1e-5 * noise[1]], 1)
    gradients = torch.stack([noise[2], -noise[2] + 1e-5 * noise[3]], 1)
    found = gradient_norms(nn.Linear(50, 50, bias=False), inputs, gradients)
    assert (found >= 0).all()
    assert (found == 0).any()
    assert (found < 3e-3 * noise[0].norm(dim=1) * noise[2].norm(dim=1)).all()


def test_the_patches_are_those_of_the_convolution():
    for name in ("conv1d", "conv2d same", "conv3d", "conv2d circular"):
        module, shape = LAYERS[name]
        inputs, _, _ = batch(module, shape)
        patches = patches_of(module, padded(module, inputs)).reshape(
            len(inputs), module.groups, -1, module(inputs).flatten(2).shape[2]
        )
        weight = module.weight.reshape(module.groups, module.out_channels // module.groups, -1)
        output = torch.einsum("goc,ngcp->ngop", weight, patches).flatten(1, 2) + module.bias[:, None]
        assert torch.allclose(output, module(inputs).flatten(2))


@pytest.mark.parametrize(
    ("module", "inputs", "gradients", "said"),
    [
        (nn.ConvTranspose1d(2, 2, 1), (1, 2, 3), (1, 2, 3), "`module` must be nn.Linear.*ConvTranspose1d"),
        (nn.Linear(2, 3), (2,), (3,), r"Linear\(in_features=2.*\(2,\) and .*\(3,\)"),
        (nn.Linear(2, 3), (4, 2), (5, 3), "batch of"),
        (nn.Linear(2, 3), (4, 6, 2), (4, 5, 3), "batch of"),
        (nn.Linear(2, 3), (4, 3), (4, 3), "batch of"),
        (nn.Conv2d(2, 3, 1), (2, 4, 4), (3, 4, 4), "batch of"),
        (nn.Conv2d(2, 3, 1), (1, 2, 4, 4), (1, 2, 4, 4), "batch of"),
        (nn.Conv2d(2, 3, 1), (1, 2, 4, 4), (2, 3, 4, 4), "batch of"),
    ],
)
def test_what_does_not_fit_is_refused(module, inputs, gradients, said):
    with pytest.raises(ValueError, match=said):
        gradient_norms(module, torch.zeros(inputs), torch.zeros(gradients))
