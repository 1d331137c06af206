"""A backbone from outside the package (helpers/foreign.py): trained, exported, checked, loaded."""

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers.foreign import Tower, TowerBackbone, TowerTrainer, nnUNetTrainerCVA_Tower
from helpers.networks import primus, unet
from helpers.projects import make_project, make_trainer, train
from helpers.targets import call, planned, randomised, target
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnunetv2_cva import load_network
from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.losses import consistency_cosine, reconstruction_loss
from nnunetv2_cva.model.backbone import Backbone
from nnunetv2_cva.model.branches import Student, Teacher, make_backbone
from nnunetv2_cva.model.naming import Family, Names
from nnunetv2_cva.training.checkpoint import Run, carry_heads
from nnunetv2_cva.transfer import network as network_module
from nnunetv2_cva.transfer import target as target_module
from nnunetv2_cva.transfer.adapt import match
from nnunetv2_cva.transfer.read import read
from nnunetv2_cva.transfer.start import start_from

SMALL = nnUNetTrainerCVA_Tower.config


def stepped(student, teacher, optimizer):
    views = torch.randn(4, 1, 16, 24, 8)
    rois = torch.tensor([[0.1, 0.2, 0.0], [0.9, 0.8, 1.0]]).repeat(4, 1, 1)
    theirs, mine = teacher(views, rois), student(views, None, rois)
    by_view = [found["bins"].unflatten(0, (2, 2)) for found in (mine, theirs)]
    inside = torch.ones(4, 1, 16, 24, 8, dtype=torch.bool)
    loss = consistency_cosine(*by_view) + reconstruction_loss(mine["reconstruction"], views, None, inside)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    teacher.follow(student, 0.5)


@pytest.fixture
def trained(tmp_path):
    """(file, student, teacher) after two steps."""
    network = TowerTrainer.build_network_architecture(None, None, 1, 1)
    student = Student(nnUNetTrainerCVA_Tower.backbone(network, SMALL), SMALL)
    teacher = Teacher(student)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    before = copy.deepcopy(network.state_dict())
    for _ in range(2):
        stepped(student, teacher, optimizer)
    assert all(not torch.equal(v, before[k]) for k, v in network.state_dict().items())
    made = target()
    content = {
        "init_args": {"plans": made.plans, "configuration": made.configuration, "fold": "all", "dataset_json": made.dataset_json},
        "trainer_name": "nnUNetTrainerCVA_Tower",
        "cva": {"version": "0.1.0", "config": SMALL.as_dict(), "history": [], "backbone_trainer": "TowerTrainer"},
    }
    torch.save(Run(student, teacher, optimizer, None).put_into(content, whole=True), tmp_path / "c.pth")
    return tmp_path / "c.pth", student, teacher


@pytest.fixture
def known(monkeypatch):
    """nnU-Net's look-up finds what is in helpers/foreign.py."""
    found = {"TowerTrainer": TowerTrainer, "nnUNetTrainerCVA_Tower": nnUNetTrainerCVA_Tower}
    for module in (target_module, network_module):
        monkeypatch.setattr(module, "trainer_class", found.get)


@pytest.mark.parametrize(
    "backbone",
    [
        make_backbone(unet(), SMALL),
        *(make_backbone(primus(v, size=(16, 24, 8)), SMALL) for v in (1, 3)),
        TowerBackbone(Tower(1, 1), SMALL),
    ],
    ids=["U-Net", "V1", "V3", "foreign"],
)
def test_the_laws_of_a_backbone(backbone):
    """Law 1, 3 and 5 of the protocol (2: test_taps), and that what is stated about the network is so."""
    methods = [name for name, value in vars(Backbone).items() if callable(value) and not name.startswith("_")]
    assert [name for name in (*Backbone.__annotations__, *methods) if not hasattr(backbone, name)] == [] and len(methods) == 4
    backbone.check_view((16, 24, 8))
    backbone.eval()
    views = torch.randn(2, 1, 16, 24, 8)
    maps, image, reconstruction = backbone(views, None)
    alone, vector = backbone.encode({n: copy.deepcopy(m) for n, m in backbone.averaged().items()}, views)
    assert [m.shape for m in maps] == [m.shape for m in alone] and image.shape == vector.shape == (2, backbone.image_channels)
    assert [m.shape[1] for m in maps] == [t.channels for t in backbone.taps] and reconstruction.shape == views.shape
    if not list(backbone.own_modules()):
        assert all(torch.equal(a, b) for a, b in zip(maps, alone, strict=True))
    (sum(m.square().sum() for m in maps) + image.square().sum() + reconstruction.square().sum()).backward()
    unread = [n for n, p in backbone.network.named_parameters() if p.requires_grad and p.grad is None]
    assert not unread
    names = Names(backbone.family, backbone.network.state_dict())
    roles = {key: names.part(key)[1] for key in backbone.network.state_dict()}
    if backbone.output is not None:
        output = backbone.network.get_submodule(backbone.output)
        assert {roles[f"{backbone.output}.{k}"] for k in output.state_dict()} == {"output"}
    averaged = {id(p) for m in backbone.family.modules(backbone.network).values() for p in m.parameters()}
    named = dict(backbone.network.named_parameters())
    assert {k for k, p in named.items() if id(p) in averaged} == {k for k in named if roles[k] == "encoder"}


def test_the_trainer_trains_and_resumes_it(tmp_path, monkeypatch):
    make_project(tmp_path, monkeypatch)
    trainer = train(nnUNetTrainerCVA_Tower)
    assert isinstance(trainer.student.backbone, TowerBackbone) and trainer.network is trainer.student.backbone.network
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    assert read(file).layout.family == TowerBackbone.family
    again = make_trainer(nnUNetTrainerCVA_Tower, resume=True)
    assert all(torch.equal(v, again.network.state_dict()[k]) for k, v in trainer.network.state_dict().items())
    log = Path(trainer.log_file).read_text(encoding="utf-8")
    assert "-tr TowerTrainer -pretrained_weights" in log


def test_it_is_checked_and_exported_with_its_parts(trained, known, tmp_path, monkeypatch, capsys):
    file, student, teacher = trained
    there = target(channels=2, classes=4, name="Dataset004_Other")
    planned(tmp_path / "preprocessed", there, monkeypatch)
    to = ("-d", 4, "-c", "3d_fullres", "-tr", "TowerTrainer")
    assert call("check", file, *to) == 0
    said = capsys.readouterr().out
    assert "pretraining checkpoint, tower, 1 input channel" in said and "1 -> 2 input channels" in said
    assert said.index("layer 0") < said.index("layer 1-2") < said.index("rise") < said.index("output layer")
    assert "Encoder: 100.0% of" in said and "Decoder: keep; it was trained to reconstruct" in said
    for branch in ("student", "teacher"):
        out = tmp_path / f"{branch}.pth"
        assert call("export", file, *to, "--branch", branch, "-o", out) == 0
        loaded = Tower(2, 4)
        load_pretrained_weights(loaded, str(out))
        body = student.backbone.network.body if branch == "student" else teacher.encoder["body"]
        assert torch.equal(loaded.body[1][0].weight, body[1][0].weight)
        assert torch.equal(loaded.rise[0].weight, student.backbone.network.rise[0].weight)
        assert read(out).layout.family == TowerBackbone.family
    assert call("info", file) == 0 and "tower, 1 input channel" in capsys.readouterr().out
    planned(tmp_path / "preprocessed", target(name="Dataset005_Stock"), monkeypatch)
    with pytest.raises(ValueError, match="holds a tower, the target is a residual U-Net"):
        match(read(file), target().build(), target().view)


def test_a_second_stage_starts_from_it_heads_and_all(trained):
    file, student, _ = trained
    network = randomised(Tower(1, 1), seed=3)
    start_from(str(file), network, target(view=(16, 24, 8)))
    assert torch.equal(network.body[2][0].weight, student.backbone.network.body[2][0].weight)
    again = Student(TowerBackbone(network, SMALL), SMALL)
    assert carry_heads(file, again) == "Heads from the file: projector, predictor, output layer; new: none."
    assert torch.equal(network.last.weight, student.backbone.network.last.weight)


def test_its_network_is_loaded_in_one_line(trained, known):
    file, student, teacher = trained
    views = torch.randn(1, 1, 16, 24, 8)
    for branch, encoder in (("student", student.backbone.averaged()), ("teacher", teacher.encoder)):
        loaded = load_network(file, branch)
        assert [(t.channels, t.stride, t.offset) for t in loaded.taps] == [
            (10, (2, 2, 2), (-0.5, -0.5, -0.5)),
            (12, (4, 4, 4), (-1.5, -1.5, -1.5)),
        ]
        for a, b in zip(loaded.maps(views), TowerBackbone.encode(encoder, views)[0], strict=True):
            assert torch.equal(a, b)
    assert torch.equal(loaded.network.last.bias, student.backbone.network.last.bias)


def test_a_family_is_written_as_plain_types_and_read_again():
    for family in (TowerBackbone.family, make_backbone(unet(), SMALL).family):
        again = Family.from_stated(json.loads(json.dumps(family.stated())))
        assert again.stated() == family.stated()


@pytest.mark.parametrize(
    "change",
    [
        {"parts": None},
        {"parts": [["a", "b", "encoder"], 3]},
        {"parts": [["a", "b", "nonsense"]]},
        {"parts": [[["a"], "b", "encoder"]]},
        {"entrance": []},
        {"averaged": ["x"]},
        {"averaged": {"x": 3}},
        {"layout": "os.system"},
        {"unknown": 1},
        {"name": None},
    ],
)
def test_what_is_no_family_is_none(change):
    assert Family.from_stated({**TowerBackbone.family.stated(), **change}) is None
    assert Family.from_stated(None) is None and Family.from_stated({}) is None


def test_a_network_of_no_known_family_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"Tower is not supported: .* found body, rise, last\. .*names its `backbone`"):
        make_backbone(Tower(1, 1), CVAConfig())
    headless = unet()
    del headless.decoder.seg_layers
    with pytest.raises(ValueError, match="`decoder` with `stages` and `seg_layers`"):
        make_backbone(headless, CVAConfig())
