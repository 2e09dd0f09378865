"""Who gets Muon: the same answers as the Node client, and what modules say beyond names."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import torch
from models import gpt, net, train
from torch import nn

from muond.torch import Optimizer, suggest
from muond.torch.routing import NameRule, route_all
from service import ROOT, Service, build

PARAMETERS: list[tuple[str, tuple[int, ...]]] = [
    ("model.embed_tokens.weight", (1000, 64)),
    ("transformer.wte.weight", (1000, 64)),
    ("wpe", (128, 64)),
    ("patch_embed.proj.weight", (64, 3, 16, 16)),
    ("h.0.attn.qkv.weight", (192, 64)),
    ("h.0.attn.qkv.bias", (192,)),
    ("h.0.attention.output.weight", (64, 64)),
    ("output.weight", (1000, 64)),
    ("model.fc.weight", (10, 64)),
    ("block.fc.weight", (256, 64)),
    ("lm_head.weight", (1000, 64)),
    ("heads.3.weight", (10, 64)),
    ("classifier.bias", (10,)),
    ("score.weight", (2, 64)),
    ("ln_f.weight", (64,)),
    ("layers.0.input_layernorm.weight", (64,)),
    ("q_norm.weight", (64, 2)),
    ("bn1.weight", (64,)),
    ("normal.weight", (64, 64)),
    ("conv1.weight", (64, 64, 3, 3)),
    ("layer.conv_wide.weight", (64, 64, 31)),
    ("downsample.0.weight", (64, 32, 1, 1)),
    ("h.0.mlp.experts.up", (8, 256, 64)),
    ("moe.down", (8, 64, 9)),
    ("side_by_side", (4, 64, 64)),
    ("narrow", (1, 64)),
    ("scalar", ()),
    ("gain", (1, 1, 64)),
    ("LM_HEAD.WEIGHT", (1000, 64)),
]


def node_says(parameters: list[tuple[str, tuple[int, ...]]]) -> list[tuple[str, str | None, str]]:
    build()
    client = (ROOT / "dist" / "src" / "client" / "client.js").as_uri()
    described = json.dumps([{"name": name, "shape": shape} for name, shape in parameters])
    script = f"""
        const {{ suggest }} = await import({json.dumps(client)})
        const {{ parameters, reasons }} = suggest({described})
        console.log(JSON.stringify(parameters.map(({{ group, matrices }}, i) => [group, matrices ?? null, reasons[i]])))
    """
    command = ["node", "--input-type=module", "-e", script]
    answer = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [tuple(row) for row in json.loads(answer)]


@pytest.mark.parametrize(
    "parameters",
    [
        PARAMETERS,
        [("stem.weight", (64, 3, 7, 7)), *PARAMETERS],
        [("features.0.weight", (8, 5, 3, 3)), ("x", (9, 3, 3, 3))],
    ],
    ids=["all", "first-convolution", "not-from-channels"],
)
def test_names_and_shapes_go_where_the_node_client_sends_them(parameters: list[tuple[str, tuple[int, ...]]]) -> None:
    ours = [(routed.route, routed.matrices, routed.why) for routed in route_all(parameters)]
    assert ours == node_says(parameters)


def test_rules_of_the_callers_own_come_first() -> None:
    rules = [NameRule("router", "adamw", "router"), NameRule("bias|conv", "muon", "mine")]
    routed = route_all([("h.router.weight", (8, 64)), ("conv", (4, 4, 3, 3)), ("w", (4, 4))], rules)
    assert [(r.route, r.why, r.matrices) for r in routed] == [
        ("adamw", "router", None),
        ("muon", "mine", "flatten"),
        ("muon", "matrix", None),
    ]


def test_a_gpt_is_shared_out_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    suggestion = suggest(gpt(), muon={"lr": 0.02})
    assert [(group["name"], group["algorithm"], len(group["params"])) for group in suggestion] == [
        ("muon", "muon", 8),
        ("adamw", "adamw", 16),
    ]
    assert (len(suggestion), suggestion[0]["lr"]) == (2, 0.02)
    printed = capsys.readouterr().out
    assert printed == f"{suggestion}\n"
    assert printed.splitlines()[:3] == [
        "parameter            shape   group  layout  why",
        "wte.weight           256x48  adamw          embedding",
        "wpe.weight           32x48   adamw          embedding",
    ]
    assert "h.0.attn.qkv.weight  144x48  muon           matrix" in printed
    suggest(gpt(), quiet=True)
    assert capsys.readouterr().out == ""


class Odd(nn.Module):
    """Names that say nothing: the modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Embedding(10, 8)
        self.b = nn.LayerNorm((4, 8))
        self.c = nn.MultiheadAttention(8, 2)
        self.d = nn.Conv1d(8, 8, 3)
        self.e = nn.Linear(8, 10, bias=False)
        self.e.weight = self.a.weight
        self.f = nn.Parameter(torch.zeros(3, 8, 20))
        self.g = nn.Parameter(torch.tensor(1.0))


def test_modules_say_more_than_names() -> None:
    suggestion = suggest(Odd(), quiet=True)
    reasons = suggestion.reasons
    assert (reasons["a.weight"], reasons["b.weight"], reasons["g"]) == ("embedding", "norm", "below rank 2")
    assert suggestion[0]["layouts"] == {
        "c.in_proj_weight": {"split": [8, 8, 8]},
        "d.weight": {"matrices": "flatten"},
        "f": {"matrices": "batch"},
    }
    given = suggest(Odd(), layouts={"f": {"matrices": "flatten"}}, quiet=True)
    assert given[0]["layouts"]["f"] == {"matrices": "flatten"}
    assert given.reasons["f"] == "layout as given"
    ruled = suggest(Odd(), rules=[NameRule(r"^a\.", "muon", "wanted")], quiet=True)
    assert ruled.reasons["a.weight"] == "wanted"
    with pytest.raises(ValueError, match="layouts has 'z'"):
        suggest(Odd(), layouts={"z": {}}, quiet=True)


def test_groups_without_parameters_are_left_out() -> None:
    assert [group["name"] for group in suggest(nn.LayerNorm(4), quiet=True)] == ["adamw"]


def test_what_is_suggested_trains(shared: Service, name: str) -> None:
    model: Any = nn.ModuleDict({"net": net(), "conv": nn.Conv2d(8, 8, 3)})
    groups = suggest(model, adamw={"lr": 0.01}, quiet=True)
    with Optimizer(model.named_parameters(), groups, url=shared.url, run=name) as optimizer:
        losses = train(model["net"], optimizer, 20)
        parameters = {p["name"]: p for p in optimizer.run.opened["parameters"]}
    assert losses[-1] < losses[0]
    assert parameters["conv.weight"]["matrices"] == "flatten"
