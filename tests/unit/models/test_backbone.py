"""Models of timm, unmodified: construction, shapes from the meta device, cards and refusals."""

import json
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from foveal.errors import ConfigError, ExportError
from foveal.models.backbone import (
    BackboneCard,
    backbone_card,
    backbone_from_card,
    build_backbone,
    build_meta_backbone,
    check_classifier_training,
    count_head_classes,
    forward_pooled_and_map,
    get_layer_ids,
    get_no_weight_decay_names,
    get_pretrained_info,
    has_batch_norm,
    head_parameter_names,
    infer_pooled_map_shapes,
    parse_encoder_card,
    set_activation_checkpointing,
)
from foveal.models.classify import Classifier
from foveal.models.config import VitConfig
from foveal.models.droppath import count_drop_paths
from foveal.models.resizable import check_resizable
from foveal.models.vit import EncoderCard, encoder_card

SWIN = "swin_tiny_patch4_window7_224"
VIT = "vit_tiny_patch16_224"
# name: (pooled width, last map) of images of 64 pixels
KINDS = {
    "resnet18": (512, (512, 2, 2)),
    "densenet121": (1024, (1024, 2, 2)),
    "efficientnet_b0": (1280, (1280, 2, 2)),
    SWIN: (768, (768, 2, 2)),
    "pvt_v2_b0": (256, (256, 2, 2)),
    VIT: (192, (192, 4, 4)),
}


def images(count: int = 2, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", KINDS)
def test_a_model_is_timms_own_and_its_shapes_are_known(name: str) -> None:
    """Weights and outputs equal timm's from the same seed; the pooled feature is the head's input."""
    torch.manual_seed(3)
    backbone: Any = build_backbone(name, 64, 3, num_classes=5)
    size_kwargs: dict[str, Any] = {"img_size": 64} if name in (SWIN, VIT) else {}
    torch.manual_seed(3)
    timm_model: Any = timm.create_model(name, num_classes=5, **size_kwargs)
    assert all(value.equal(timm_model.state_dict()[key]) for key, value in backbone.state_dict().items())
    pooled, feature_map = forward_pooled_and_map(backbone.eval(), images())
    assert backbone(images()).equal(timm_model.eval()(images()))
    assert (pooled.shape[1], tuple(feature_map.shape[1:])) == infer_pooled_map_shapes(name, 64, 3) == KINDS[name]
    with torch.no_grad():
        assert backbone.get_classifier()(pooled).equal(backbone(images()))
    check_classifier_training(name, 64, 3, 5, 2)


def test_patches_are_laid_out_as_they_lay_in_the_image() -> None:
    model: Any = build_backbone(VIT, (32, 64), 3).eval()
    tokens = model.forward_features(torch.ones(1, 3, 32, 64))
    _, feature_map = forward_pooled_and_map(model, torch.ones(1, 3, 32, 64))
    assert feature_map.shape == (1, 192, 2, 4)
    assert feature_map[0, :, 1, 2].equal(tokens[0, 1 + 1 * 4 + 2])
    assert infer_pooled_map_shapes(VIT, (32, 64), 3) == (192, (192, 2, 4))


def test_a_build_takes_its_own_draws_and_no_others() -> None:
    """Builds advance the global generator as timm does; inspections of a model leave it unchanged."""
    torch.manual_seed(3)
    timm.create_model("resnet18", num_classes=5)
    expected = torch.rand(3)
    torch.manual_seed(3)
    build_backbone("resnet18", 64, 3, num_classes=5)
    assert torch.rand(3).equal(expected)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    infer_pooled_map_shapes("resnet26", 64, 3)
    head_parameter_names("resnet26", 64, 3)
    check_classifier_training("resnet26", 64, 3, 5, 2)
    assert torch.random.get_rng_state().equal(before)


def test_a_card_builds_the_model_again() -> None:
    card = json.loads(json.dumps(backbone_card("resnet18", (32, 64), 1, num_classes=3)))
    parsed = parse_encoder_card(card, "card.json")
    assert isinstance(parsed, BackboneCard)
    assert (parsed.build_args, parsed.classes) == (("resnet18", (32, 64), 1), 3)
    direct = build_backbone(*parsed.build_args, num_classes=3)
    shapes = {name: value.shape for name, value in direct.state_dict().items()}
    rebuilt = backbone_from_card(card, "card.json", drop_path=0.2)
    assert {name: value.shape for name, value in rebuilt.state_dict().items()} == shapes
    assert count_drop_paths(rebuilt) == 7
    headless: Any = backbone_from_card(card, "card.json", num_classes=0)
    assert headless.num_classes == 0
    assert isinstance(parse_encoder_card(encoder_card(VitConfig(name=VIT), 224, 3), "card.json"), EncoderCard)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timm": "resnet19"}, "card.json: 'resnet19' is not a model of timm"),
        ({"colour": "red"}, "card.json: colour is not a setting"),
        ({"channels": 0}, "card.json: channels"),
    ],
)
def test_a_card_that_tells_of_none_is_one_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError) as caught:
        backbone_from_card(backbone_card("resnet18", 32, 3) | change, "card.json")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "size", "kwargs", "message"),
    [
        ("resnet19", 32, {}, "'resnet19' is not a model of timm .* Did you mean 'resnet"),
        ("xyz", 32, {}, r"See timm.list_models\(\)"),
        ("densenet121", 32, {"drop_path": 0.1}, "'densenet121' has no drop path; set drop_path=0 instead of 0.1"),
        (
            "twins_svt_small",
            30,
            {},
            "timm cannot build 'twins_svt_small' for images of 30 x 30 pixels with 3 channels: ",
        ),
        (VIT, 18, {}, f"image_size=18 x 18 is not a whole number of the 16 x 16 patches of '{VIT}'"),
        ("gcvit_xxtiny", 20, {}, "timm cannot build 'gcvit_xxtiny' for images of 20 x 20 pixels with 3 channels: "),
    ],
)
def test_a_model_that_cannot_be_is_one_sentence(name: str, size: int, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(name, size, 3, **kwargs)


@pytest.mark.parametrize("name", ["test_resnet", "ghostnet_100"])
def test_no_dropout_is_drawn_wherever_it_is_called(name: str) -> None:
    """Includes models that call F.dropout with timm's default rate of 0.2."""
    backbone, batch = build_backbone(name, 64, 3, num_classes=5).train(), images()
    backbone.load_state_dict({key: value + 0.01 for key, value in backbone.state_dict().items()})
    torch.manual_seed(0)
    first = backbone(batch)
    torch.manual_seed(1)
    assert backbone(batch).equal(first)


def test_what_training_would_fall_over_is_one_sentence() -> None:
    start = "cannot train on a microbatch of"
    with pytest.raises(ConfigError, match=f"'inception_v3' {start} 2 images of 16 x 16 pixels: "):
        check_classifier_training("inception_v3", 16, 3, 5, 2)
    with pytest.raises(ConfigError, match=f"'resnet18' {start} 1 images of 32 x 32 pixels: Expected more"):
        check_classifier_training("resnet18", 32, 3, 5, 1)
    with pytest.raises(ConfigError, match="'mixer_s32_224' makes no feature map of images of 32 x 32 pixels"):
        infer_pooled_map_shapes("mixer_s32_224", 32, 3)


@pytest.mark.parametrize("name", ["rexnet_100", "nextvit_small", "swinv2_cr_tiny_ns_224"])
def test_nothing_is_drawn_in_a_forward(name: str) -> None:
    """Some names of timm bring dropout or drop path; only the setting counts."""
    model = build_meta_backbone(name, 224, 3, 5)
    assert count_drop_paths(model) == 0
    assert not [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p]


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", {"fc.weight", "fc.bias"}),
        (SWIN, {"head.fc.weight", "head.fc.bias"}),
        ("densenet121", {"classifier.weight", "classifier.bias"}),
    ],
)
def test_a_head_is_what_the_classes_need(name: str, head: set[str]) -> None:
    assert set(head_parameter_names(name, 64, 3)) == head
    for classes in (0, 3):
        weights = build_meta_backbone(name, 64, 3, classes).state_dict()
        assert count_head_classes(weights, name, 64, 3) == classes


def test_images_of_another_size_where_weights_do_not_depend_on_it() -> None:
    check_resizable(BackboneCard(timm="resnet18", image_size=224, channels=3), 32, "it")
    check_resizable(BackboneCard(timm="pvt_v2_b0", image_size=224, channels=3), 64, "it")
    for name, weight in ((SWIN, "relative_position_bias_table"), (VIT, "pos_embed")):
        with pytest.raises(ExportError, match=f"it is a {name} of images of 224 x 224 pixels and .*{weight}") as caught:
            check_resizable(BackboneCard(timm=name, image_size=224, channels=3), 64, "it")
        assert str(caught.value).endswith("data.image_size is 64 x 64")


@pytest.mark.parametrize("name", ["mixer_s32_224", VIT])
def test_a_grid_of_as_many_patches_is_another_size(name: str) -> None:
    """4 x 4 and 2 x 8 patches: weights of one shape, in another order."""
    patch = 32 if name.startswith("mixer") else 16
    card = BackboneCard(timm=name, image_size=4 * patch, channels=3)
    check_resizable(card, 4 * patch, "it")
    with pytest.raises(ExportError, match="has weights of that size alone"):
        check_resizable(card, (2 * patch, 8 * patch), "it")
    check_resizable(BackboneCard(timm="resnet18", image_size=64, channels=3), (32, 128), "it")


def test_layers_are_timms() -> None:
    layers = get_layer_ids(build_meta_backbone("resnet18", 64, 3, 5))
    names = ("conv1.weight", "layer1.0.conv1.weight", "layer1.1.bn2.bias", "layer4.1.conv2.weight", "fc.bias")
    assert [layers[name] for name in names] == [0, 1, 2, 8, 9]
    layers = get_layer_ids(build_meta_backbone(SWIN, 64, 3, 5))
    assert (layers["patch_embed.proj.weight"], max(layers.values()), layers["head.fc.weight"]) == (0, 13, 13)
    model: Any = build_backbone("test_resnet", 32, 3)
    model.group_matcher = None
    with pytest.raises(
        ConfigError, match=r"timm does not number the layers of 'test_resnet': set optim\.layer_decay=1"
    ):
        get_layer_ids(model)


def test_tables_of_biases_are_not_decayed() -> None:
    names = get_no_weight_decay_names(build_meta_backbone(SWIN, 64, 3))
    assert len(names) == 12
    assert all(name.endswith("relative_position_bias_table") for name in names)
    assert get_no_weight_decay_names(build_meta_backbone("resnet18", 64, 3)) == set()


def test_which_models_have_batch_norm() -> None:
    with_batch_norm = {name for name in KINDS if has_batch_norm(build_meta_backbone(name, 64, 3))}
    assert with_batch_norm == {"resnet18", "densenet121", "efficientnet_b0"}


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_recomputing_changes_neither_gradients_nor_running_statistics(name: str) -> None:
    """Two microbatches: the recomputation in the backward does not update running statistics again."""
    states = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Classifier(build_backbone(name, 32, 3, num_classes=5)).train()
        model.set_grad_checkpointing(recompute)
        for _ in range(2):
            model(images(4, 32)).square().sum().backward()
        gradients = {f"{name} gradient": parameter.grad for name, parameter in model.named_parameters()}
        states.append(model.state_dict() | gradients)
    assert all(value.equal(states[1][key]) for key, value in states[0].items())


def test_what_cannot_be_recomputed_is_one_sentence() -> None:
    with torch.device("meta"):
        backbone = build_backbone("vgg11", 32, 3)
    with pytest.raises(
        ConfigError, match=r"cannot recompute the activations of 'vgg11': set engine\.activation_checkpointing=false"
    ):
        set_activation_checkpointing(backbone, enable=True)


def test_what_timm_says_of_its_weights() -> None:
    info = get_pretrained_info("resnet18")
    assert (info.mean, info.image_size, info.first_layer_name) == ((0.485, 0.456, 0.406), (224, 224), "conv1")
    with pytest.raises(ConfigError, match="is not a model of timm"):
        get_pretrained_info("resnet19")
