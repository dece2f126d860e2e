"""timm's and torchvision's own models and parts in the loops of their training scripts, where both can be installed.

They do not fit the torch build of the other tests: in an environment of their own, with the torch that they need,

    pip install timm torchvision pytest hypothesis . && pytest tests/integrations/test_timm.py
"""

import copy

import pytest
import torch
from slow_reference import assert_same, weights

from asam import ASAM

timm = pytest.importorskip("timm", reason="timm, which needs torchvision, is not installed", exc_type=ImportError)
torchvision = pytest.importorskip("torchvision", exc_type=ImportError)

from timm.data import Mixup  # noqa: E402
from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import CosineLRScheduler  # noqa: E402
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad  # noqa: E402
from torchvision.transforms.v2 import CutMix  # noqa: E402

CLASSES, STEPS, MICRO_BATCHES, RHO = 4, 3, 2, 0.3


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS * MICRO_BATCHES):
        yield (
            torch.randn(4, 3, 32, 32, generator=generator),
            torch.randint(CLASSES, (4,), generator=generator),
        )


def timm_script(model, optimizer, asam, average, loss_scaler):
    """What docs/frameworks/timm-torchvision.md makes of ``train_one_epoch``, or the loop of the README."""
    criterion, mixup = SoftTargetCrossEntropy(), Mixup(mixup_alpha=0.2, num_classes=CLASSES)
    scheduler, updates, seen = CosineLRScheduler(optimizer, t_initial=STEPS, t_in_epochs=False), 0, []
    for i, batch in enumerate(batches()):
        inputs, targets = mixup(*batch)
        need_update = (i + 1) % MICRO_BATCHES == 0

        def forward(inputs=inputs, targets=targets):
            with torch.autocast("cpu", torch.bfloat16, enabled=False):
                return criterion(model(inputs), targets) / MICRO_BATCHES

        if loss_scaler is None:
            asam.backward(forward)
        else:
            asam.backward(forward, backward=lambda loss: loss_scaler(loss, optimizer, need_update=False))
        if not need_update:
            continue
        if loss_scaler is None:
            dispatch_clip_grad(model.parameters(), value=0.5)
            optimizer.step()
        else:
            scaler = loss_scaler._scaler
            scaler.unscale_(optimizer)
            dispatch_clip_grad(model.parameters(), value=0.5)
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        updates += 1
        average.update(model, step=updates)
        scheduler.step_update(updates)
        seen.append(weights(model))
    return seen


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("base", ["sgd", "adamw", "lamb"])
def test_timms_loop_with_its_scaler_is_that_without(name, base):
    results = []
    for loss_scaler in (None, NativeScaler(device="cpu")):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=CLASSES, **({"img_size": 32} if "vit" in name else {}))
        optimizer = create_optimizer_v2(model, opt=base, lr=0.01, weight_decay=0.05)
        average = ModelEmaV3(model, decay=0.75)
        torch.manual_seed(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("numpy.random.beta", lambda a, b: 0.3)
            seen = timm_script(model, optimizer, ASAM(model, rho=RHO), average, loss_scaler)
        results.append((seen, dict(model.named_buffers()), weights(average.module)))
    (seen, buffers, average), (scaled, scaled_buffers, scaled_average) = results
    # the scale is a power of 2: it changes no bit, unless something under- or overflows
    assert_same(scaled[-1], seen[-1])
    assert_same(scaled_buffers, buffers)
    assert_same(scaled_average, average)
    assert any(not torch.equal(w, seen[1][name]) for name, w in seen[0].items())
    for key in (key for key in buffers if key.endswith("num_batches_tracked")):
        assert buffers[key] == STEPS * MICRO_BATCHES


def test_timms_average_never_sees_the_weights_perturbed():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=CLASSES)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01)
    average = ModelEmaV3(model, decay=0.75)
    first, *others = timm_script(model, optimizer, ASAM(model, rho=RHO), average, None)
    expected = first  # the first update copies
    for step in others:
        expected = {name: torch.lerp(w, step[name], 0.25) for name, w in expected.items()}
    for name, w in weights(average.module).items():
        torch.testing.assert_close(w, expected[name], rtol=1e-6, atol=1e-7)


def test_torchvisions_loop_with_a_scaler_is_that_without():
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu")):
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=CLASSES)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        criterion, asam, outputs = torch.nn.CrossEntropyLoss(label_smoothing=0.1), ASAM(model, rho=RHO), []
        cutmix = CutMix(num_classes=CLASSES)
        for images, classes in batches():
            image, target = cutmix(images, classes)

            def closure(image=image, target=target, model=model, outputs=outputs, criterion=criterion):
                outputs.append(model(image))
                return criterion(outputs[-1], target)

            optimizer.zero_grad()
            if scaler is None:
                asam.backward(closure)
                optimizer.step()
            else:
                asam.backward(closure, backward=lambda loss, scaler=scaler: scaler.scale(loss).backward())
                scaler.step(optimizer)
                scaler.update()
        results.append((weights(model), copy.deepcopy(dict(model.named_buffers())), outputs[0]))
    assert_same(results[1][0], results[0][0])
    assert_same(results[1][1], results[0][1])
    assert torch.equal(results[1][2], results[0][2])
    assert results[0][1]["bn1.num_batches_tracked"] == STEPS * MICRO_BATCHES
