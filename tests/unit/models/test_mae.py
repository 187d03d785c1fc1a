"""The masked autoencoder as a module: gradients, refusals, external parameters and compilation."""

import pytest
import torch
from encoders import KINDS, PLAIN, RELATIVE, autoencoder_of, encoder_of

from foveal.errors import ConfigError
from foveal.models.classify import Classifier
from foveal.models.config import DecoderConfig, Positions, VitConfig
from foveal.models.encode import encode_cls_and_patches
from foveal.models.mae import MaskedAutoencoder
from foveal.models.patches import build_reconstruction_targets, reconstruction_loss, split_patches_by_noise
from foveal.models.students import FeatureStudent, LayerStudent, Students
from foveal.models.timm_vit import Encoder
from foveal.models.vit import build_encoder

TINY = VitConfig(patch=4, width=32, depth=2, heads=2)
GRAPHS: list[tuple[str, Positions | None]] = [
    (PLAIN[0], "sincos"),
    (RELATIVE[0], None),
    ("vit_small_patch16_rope_mixed_ape_224", "learned"),
    ("eva02_tiny_patch14_224", "sincos"),
]
SMALL = DecoderConfig(width=16, depth=2, heads=2)


def autoencoder() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(build_encoder(TINY, image_size=16, channels=3), SMALL)


def loss_of(model: MaskedAutoencoder, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    pred, masked, *_ = model(images, noise, 0.75)
    total, weight = reconstruction_loss(pred, build_reconstruction_targets(images, masked, 4, norm_pix=True))
    return total / weight


def gradients(model: MaskedAutoencoder, images: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model, images, noise).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(("name", "positions"), KINDS)
def test_everything_that_can_learn_does(name: str, positions: Positions | None) -> None:
    model = autoencoder_of(name, positions)
    gradient_by_name = gradients(model, torch.rand(3, 3, 16, 16), torch.rand(3, 16))
    assert {name for name, gradient in gradient_by_name.items() if not gradient.any()} == set()
    assert set(gradient_by_name) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert ("encoder.pos_embed" in gradient_by_name) == (positions == "learned")


@pytest.mark.parametrize(("name", "positions"), KINDS)
def test_recomputing_the_blocks_changes_nothing(name: str, positions: Positions | None) -> None:
    model, images, noise = autoencoder_of(name, positions), torch.rand(3, 3, 16, 16), torch.rand(3, 16)
    expected = gradients(model, images, noise)
    model.set_grad_checkpointing(True)
    for parameter_name, gradient in gradients(model, images, noise).items():
        torch.testing.assert_close(gradient, expected[parameter_name], rtol=0, atol=0, msg=parameter_name)


@pytest.mark.parametrize(("name", "positions"), KINDS)
def test_lower_precision_weights_take_float_images(name: str, positions: Positions | None) -> None:
    model, images, noise = autoencoder_of(name, positions), torch.rand(2, 3, 16, 16), torch.rand(2, 16)
    exact = loss_of(model, images, noise)
    assert loss_of(model.bfloat16(), images, noise).item() == pytest.approx(exact.item(), rel=0.02)


def test_the_state_is_the_encoder_and_what_the_decoder_learns() -> None:
    names = set(autoencoder().state_dict())
    assert {name for name in names if name.startswith("encoder.")} == {
        f"encoder.{name}" for name in build_encoder(TINY, image_size=16, channels=3).state_dict()
    }
    assert "decoder.mask_token" in names
    assert not any("positions" in name for name in names)


@pytest.mark.parametrize("sizes", [{"width": 30, "heads": 2}, {"width": 16, "heads": 3}])
def test_a_decoder_whose_sizes_do_not_fit_is_one_sentence(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"run.yaml: width=\d+ is not a multiple of 4 and of heads=\d; width=\d+ is"):
        DecoderConfig.from_dict(sizes, "run.yaml")


@pytest.mark.parametrize(
    ("name", "positions"),
    [GRAPHS[0], *(pytest.param(*graph, marks=pytest.mark.thorough) for graph in GRAPHS[1:])],
)
def test_each_model_is_one_graph(name: str, positions: Positions | None) -> None:
    images, draws = torch.rand(2, 3, 16, 16), torch.rand(2, 2, 16)
    model = autoencoder_of(name, positions)
    plain = [model(images, noise, 0.75)[0] for noise in draws]
    model.compile(backend="aot_eager", fullgraph=True)
    for noise, expected in zip(draws, plain, strict=True):
        torch.testing.assert_close(model(images, noise, 0.75)[0], expected, rtol=1e-4, atol=1e-5)
    assert not any("_orig_mod" in name for name in model.state_dict())


def test_a_compiled_classifier_takes_new_drops_every_step() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(TINY, image_size=16, channels=3, drop_path=0.5, num_classes=5)
    torch.nn.init.normal_(encoder.get_parameter("head.weight"))
    model, images = Classifier(encoder).train(), torch.rand(2, 3, 16, 16)
    draws = [torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.ones(2, 2), torch.zeros(2, 2)]
    plain = [model(images, noise) for noise in draws]
    model.compile(backend="aot_eager", fullgraph=True)
    for noise, expected in zip(draws, plain, strict=True):
        torch.testing.assert_close(model(images, noise), expected, rtol=1e-5, atol=1e-6)


def reads_outside_its_module(model: torch.nn.Module, *inputs: object) -> set[str]:
    """Return the parameters that a forward reads while the module that owns them is not being called."""
    owners = [(name, module) for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    modules_in_call: set[str] = set()
    read: set[str] = set()

    class Watched(dict):
        def __init__(self, owner: str, parameters: dict) -> None:
            super().__init__(parameters)
            self.owner = owner

        def __getitem__(self, key: str) -> torch.nn.Parameter | None:
            parameter = super().__getitem__(key)
            if self.owner not in modules_in_call and parameter is not None:
                read.add(f"{self.owner}.{key}")
            return parameter

    for name, module in owners:
        module._parameters = Watched(name, module._parameters)
        module.register_forward_pre_hook(lambda *_, name=name: modules_in_call.add(name))
        module.register_forward_hook(lambda *_, name=name: modules_in_call.discard(name))
    model(*inputs)
    return read


def feature_student(encoder: Encoder) -> FeatureStudent:
    width = encoder.embed_dim
    return FeatureStudent(encoder, encode_cls_and_patches, (width, width), (48, 48), with_patches=True)


@pytest.mark.parametrize(("name", "positions"), KINDS)
def test_what_is_read_outside_its_module_is_declared(name: str, positions: Positions | None) -> None:
    images, noise = torch.rand(2, 3, 16, 16), torch.rand(2, 16)
    model = autoencoder_of(name, positions)
    student = Students([feature_student(encoder_of(name, positions))])
    layers = Students([LayerStudent(encoder_of(name, positions), [1], 48, None)])
    for tested in (model, student, layers):
        external_ids = {id(parameter) for parameter in tested.external_parameters()}
        declared = {name for name, parameter in tested.named_parameters() if id(parameter) in external_ids}
        inputs = (images, noise, 0.75) if tested is model else (images, *split_patches_by_noise(noise, 0.75))
        assert reads_outside_its_module(tested, *inputs) == declared


def test_a_plain_classifier_reads_nothing_outside_its_modules() -> None:
    classifier = Classifier(build_encoder(TINY, image_size=16, channels=3, num_classes=2))
    assert reads_outside_its_module(classifier, torch.rand(2, 3, 16, 16)) == set()


def test_a_student_answers_in_the_width_of_its_teacher() -> None:
    torch.manual_seed(0)
    encoder, images = build_encoder(TINY, image_size=16, channels=3), torch.rand(2, 3, 16, 16)
    student = feature_student(encoder)
    cls, patches = student(images)
    assert (cls.shape, patches.shape) == ((2, 48), (2, 16, 48))
    encoder_cls, encoder_patches = encode_cls_and_patches(encoder, images)
    assert (encoder_cls.shape, encoder_patches.shape) == ((2, 32), (2, 16, 32))
    torch.testing.assert_close(cls, encoder_cls @ student.project_cls.weight.T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        patches, encoder_patches @ student.get_parameter("project_patches.weight").T, rtol=1e-5, atol=1e-6
    )


def test_features_are_taken_after_a_norm() -> None:
    with pytest.raises(AssertionError, match="avg"):
        encode_cls_and_patches(build_encoder(TINY, image_size=16, channels=3, pooling="avg"), torch.rand(1, 3, 16, 16))
