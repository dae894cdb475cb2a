"""One tester for all models: shapes, training, checkpoints, compilation, export."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from segops.models import Output, list_models

from .small import BILINEAR, CLASSES, MULTI_SCALE, OPTIONS, SMALL, VARIANTS, Case, assert_same, perturbed, total

SIZES = [(64, 96), (65, 97), (49, 130), (17, 20)]


def test_every_model_is_tested():
    assert [case.name for case in SMALL] == list_models()
    assert {case.name for case in VARIANTS + OPTIONS} <= set(list_models())


every = pytest.mark.parametrize("case", SMALL + VARIANTS + OPTIONS, ids=str)
most = pytest.mark.parametrize("case", SMALL + VARIANTS, ids=str)

# These are made of what others are made of, with other widths and rates, or with more or fewer layers.
ALIKE = ("fcn32s", "fcn16s", "segnet_aspp", "dilated_frontend", "deeplabv2", "deeplabv3", "deeplabv3_cascaded", "deeplabv3_pac")
ALIKE += ("unet_inception", "runet")
DISTINCT = [case for case in SMALL if case.name not in ALIKE]
OPS = ("fcn8s", "segnet", "segnet_basic", "pacnet", "jointseg")  # whose graphs have ops of segops


def thorough_but(fast, *values):
    return pytest.param(*values, marks=[] if fast else pytest.mark.thorough, id=" ".join(map(str, values)))


without_options = pytest.mark.parametrize(
    "case", [thorough_but(case not in OPTIONS, case) for case in SMALL + VARIANTS + OPTIONS]
)


class TestModel:
    @every
    def test_shapes(self, case):
        model = case.build().eval()
        for size in SIZES:
            with torch.no_grad():
                output = model(*case.inputs(size))
            assert type(output) is Output
            assert output.logits.shape == (2, 1 if case.judges else CLASSES, *case.logits_size(size))
            assert output.logits.dtype == torch.float32

    @pytest.mark.parametrize("case", [case for case in SMALL + VARIANTS + OPTIONS if not case.judges], ids=str)
    def test_predict(self, case):
        model = perturbed(case.build()).eval()
        images = case.inputs((33, 50))[0]
        classes = model.predict(images)
        logits = model(images).logits
        resized = F.interpolate(logits, (33, 50), mode="bilinear", align_corners=case.name == "pspnet")
        assert classes.dtype == torch.int64 and classes.shape == (2, 33, 50)
        assert torch.equal(classes, (logits if case.stride == 1 else resized).argmax(1))

    @most
    def test_in_channels(self, case):
        model = case.build(in_channels=4).eval()
        assert model.in_channels == 4
        with torch.no_grad():
            images, *others = case.inputs((33, 50), channels=4)
            changed = torch.cat([images[:, :3], images[:, 3:] + 1], dim=1)
            perturbed(model)
            output, other = model(images, *others), model(changed, *others)
        assert output.logits.shape[2:] == case.logits_size((33, 50))
        assert case.options.get("conditioned") is False or not torch.equal(output.logits, other.logits)

    @every
    def test_one_image_trains_every_parameter(self, case):
        model = case.build().train()
        total(model(*case.inputs((65, 49), batch=1))).backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not missing

    @every
    def test_every_parameter_matters(self, case):
        """Batch normalisation keeps its statistics here: in training it hides a bias before it."""
        model = perturbed(case.build()).eval()
        total(model(*case.inputs((65, 49)))).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []

    @every
    def test_checkpoint_round_trip(self, case, tmp_path):
        model = perturbed(case.build()).eval()
        torch.save(model.state_dict(), tmp_path / "model.pt")
        inputs = case.inputs((48, 64))
        expected = model(*inputs)
        loaded = case.build(checkpoint=tmp_path / "model.pt").eval()
        assert_same(loaded(*inputs), expected)

    @most
    def test_copy_is_a_model_of_its_own(self, case):
        """As a moving average of the weights needs it."""
        model = perturbed(case.build()).eval()
        inputs = case.inputs((33, 50))
        expected = model(*inputs)
        twin = copy.deepcopy(model)
        perturbed(model)
        assert_same(twin(*inputs), expected)

    @without_options
    def test_eval_is_deterministic_and_takes_images_one_by_one(self, case):
        model = perturbed(case.build()).eval()
        inputs = case.inputs((49, 66), batch=3)
        logits = model(*inputs).logits
        assert torch.equal(model(*inputs).logits, logits)
        for i in range(3):
            assert_same(model(*(tensor[i : i + 1] for tensor in inputs)).logits, logits[i : i + 1])

    @without_options
    def test_channels_last(self, case):
        model = perturbed(case.build()).eval()
        inputs = case.inputs((49, 66))
        expected = model(*inputs)
        model = model.to(memory_format=torch.channels_last)
        assert_same(model(*(tensor.to(memory_format=torch.channels_last) for tensor in inputs)), expected)

    @without_options
    @torch.no_grad()
    def test_autocast(self, case):
        """About as exact as the float32 model with weights, images and logits rounded to bfloat16."""
        model = perturbed(case.build()).eval()
        inputs = case.inputs((case.least + 16, case.least + 16))
        expected = model(*inputs).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(*inputs).logits.float()
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        rounded = model(*(tensor.bfloat16().float() for tensor in inputs)).logits.bfloat16().float()
        assert (logits - expected).norm() < 3 * (rounded - expected).norm()  # activations are rounded too
        assert (logits - expected).norm() > 0  # or autocast did nothing

    @most
    def test_training_under_autocast(self, case):
        model = case.build().train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = total(model(*case.inputs((64, 64))))
        loss.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())

    @pytest.mark.parametrize(
        ("case", "backend"),
        [thorough_but(case.name in OPS, case, "aot_eager") for case in [*SMALL, MULTI_SCALE]]
        + [pytest.param(case, "eager", id=f"{case} eager") for case in [*DISTINCT, MULTI_SCALE] if case.name not in OPS],
    )
    def test_compile_without_a_graph_break(self, case, backend):
        """AOT autograd, which takes longer than Dynamo, has something to break in ops of segops alone."""
        model = perturbed(case.build()).eval()
        inputs = case.inputs((64, 96))
        expected = model(*inputs)
        output = torch.compile(model, fullgraph=True, backend=backend)(*inputs)
        assert type(output) is Output
        assert_same(output, expected)
        parameters = list(model.parameters())
        gradients = [torch.autograd.grad(total(o), parameters) for o in (output, expected)]
        assert_same(*gradients)

    @pytest.mark.parametrize(
        "case", [thorough_but(case in [*DISTINCT, MULTI_SCALE, BILINEAR], case) for case in SMALL + VARIANTS]
    )
    def test_export_with_dynamic_height_and_width(self, case):
        model = perturbed(case.build()).eval()
        least = case.least
        height, width = (torch.export.Dim(name, min=least, max=4096) for name in ("height", "width"))
        inputs = case.inputs((least + 16, least + 48))
        shapes = ({2: height, 3: width},) * len(inputs)
        program = torch.export.export(model, inputs, dynamic_shapes=shapes).module()
        for size in ((least + 33, least + 64), (least + 1, 2 * least + 34)):
            inputs = case.inputs(size)
            output = program(*inputs)
            assert type(output) is Output
            assert_same(output, model(*inputs))

    @pytest.mark.parametrize("case", [thorough_but(case in DISTINCT, case) for case in SMALL])
    def test_overfits_four_images(self, case):
        """A guess that does not look at the image costs log(4) or more: no pixel has the same class in two images."""
        model = case.build()
        halves = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
        labels = halves[:, None, :].repeat_interleave(16, 2).expand(4, 32, 32)
        images = torch.randn(4, 3, 1, 2).repeat_interleave(16, 3) + 0.1 * torch.randn(4, 3, 32, 32)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(100):
            if case.judges:
                real = model(images, labels).logits
                fake = model(images, torch.rand(4, CLASSES, 32, 32).softmax(1)).logits
                loss = (F.softplus(-real) + F.softplus(fake)).mean()
            else:
                logits = F.interpolate(model(images).logits, (32, 32), mode="bilinear")
                loss = F.cross_entropy(logits, labels)
            if loss < 0.5 * math.log(4):
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.5 * math.log(4)


@pytest.mark.parametrize("case", [Case("segnet_basic", {"channels": 8}), Case("pacnet", {"backbone": "resnettiny"})], ids=str)
def test_a_single_class_is_predicted_where_its_logit_is_positive(case):
    model = perturbed(case.build(num_classes=1)).eval()
    images = torch.randn(2, 3, 33, 50)
    logits = F.interpolate(model(images).logits, (33, 50), mode="bilinear")
    classes = model.predict(images)
    assert torch.equal(classes, (logits[:, 0] > 0).long())
