"""Who gets Muon: the same answers as the Node client, and what modules say beyond names."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import pytest
import torch
from models import gpt, net, train
from torch import nn

from muond import MuondError
from muond.torch import Optimizer, suggest
from muond.torch.routing import NAME_RULES, NameRule, route_all
from service import ROOT, Service, build

PARAMETERS: list[tuple[str, tuple[int, ...]]] = [
    ("patch_embed.proj.weight", (64, 3, 16, 16)),
    ("wpe", (128, 64)),
    ("h.0.attn.qkv.bias", (192,)),
    ("bn1.weight", (64,)),
    ("q_norm.weight", (64, 2)),
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
# Names that the Node client's own tests ask about, those of published models among them.
NAMES = sorted(
    {
        name
        for path in ("suggest.test.ts", "models.ts")
        for name in re.findall(r"'([\w.$]+)'", (ROOT / "test" / "client" / path).read_text())
    }
)


def node(script: str) -> Any:
    """What a script of the Node client's prints as JSON."""
    build()
    folder = (ROOT / "dist" / "src" / "client").as_uri()
    command = ["node", "--input-type=module", "-e", script.replace("CLIENT", folder)]
    answer = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return json.loads(answer)


def node_says(parameters: list[tuple[str, tuple[int, ...]]]) -> list[tuple[str, str | None, str]]:
    described = json.dumps([{"name": name, "shape": shape} for name, shape in parameters])
    rows = node(f"""
        const {{ suggest }} = await import('CLIENT/client.js')
        const {{ parameters, reasons }} = suggest({described})
        console.log(JSON.stringify(parameters.map(({{ group, matrices }}, i) => [group, matrices ?? null, reasons[i]])))
    """)
    return [tuple(row) for row in rows]


def test_the_rules_are_those_of_the_node_client_letter_by_letter() -> None:
    theirs = node("""
        const { NAME_RULES } = await import('CLIENT/routing.js')
        const row = ({ name, route, why, matrices = null }) => [name.source, name.flags, route, why, matrices]
        console.log(JSON.stringify(NAME_RULES.map(row)))
    """)
    assert [[rule.name, "i", rule.route, rule.why, rule.matrices] for rule in NAME_RULES] == theirs


@pytest.mark.parametrize(
    "parameters",
    [
        PARAMETERS,
        [("stem.weight", (64, 3, 7, 7)), *PARAMETERS],
        [("features.0.weight", (8, 5, 3, 3)), ("x", (9, 3, 3, 3))],
        [(name, (8, 8)) for name in NAMES],
        [(name, (8, 8, 64)) for name in NAMES],
    ],
    ids=["shapes", "first-convolution", "not-from-channels", "names", "names-of-more"],
)
def test_names_and_shapes_go_where_the_node_client_sends_them(parameters: list[tuple[str, tuple[int, ...]]]) -> None:
    ours = [(routed.route, routed.matrices, routed.why) for routed in route_all(parameters)]
    assert ours == node_says(parameters)


def test_the_names_are_there() -> None:
    # Read from files of the Node client, whose form may change.
    assert len(NAMES) > 60
    assert {"tok_emb.weight", "shared.weight", "classifier.out_proj.weight", "proj_out.weight"} <= set(NAMES)


def test_rules_of_the_callers_own_come_first() -> None:
    rules = [
        NameRule("router", "adamw", "router"),
        NameRule("bias|conv", "muon", "mine"),
        NameRule("stack", "muon", "a stack", "flatten"),
    ]
    stacks: list[tuple[str, tuple[int, ...]]] = [("stack", (4, 64, 64)), ("stack", (4, 64))]
    routed = route_all([("h.router.weight", (8, 64)), ("conv", (4, 4, 3, 3)), *stacks, ("w", (4, 4))], rules)
    assert [(r.route, r.why, r.matrices) for r in routed] == [
        ("adamw", "router", None),
        ("muon", "mine", "flatten"),
        ("muon", "a stack", "flatten"),
        ("muon", "a stack", None),
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
        parameters = {slot.declaration.name: slot.declaration for slot in optimizer._home.slots}
    assert losses[-1] < losses[0]
    assert parameters["conv.weight"].matrices == "flatten"


def test_a_preset_brings_algorithms_and_values_for_both(shared: Service, name: str) -> None:
    model = net()
    groups = suggest(model, preset="kimi-k2", muon={"lr": 0.02}, adamw={"betas": (0.8, 0.9)}, quiet=True)
    with Optimizer(model.named_parameters(), groups, url=shared.url, run=name) as optimizer:
        # Schedulers find the recipe's rate where they look for it.
        assert [group["lr"] for group in optimizer.param_groups] == [0.02, 2e-4]
        train(model, optimizer, 2)
        held = optimizer.run.groups
        saved = optimizer.state_dict()
    wanted = {"preset": "kimi-k2", "algorithm": "muonclip", "lr": 0.02, "adjust_lr_fn": "match_rms_adamw"}
    assert {key: held["muon"][key] for key in wanted} == wanted
    wanted = {"preset": "kimi-k2", "algorithm": "adamw", "lr": 2e-4, "weight_decay": 0.1, "betas": [0.8, 0.9]}
    assert {key: held["adamw"][key] for key in wanted} == wanted
    with Optimizer(model.named_parameters(), groups, url=shared.url, run=name) as optimizer:
        optimizer.load_state_dict(saved)
        optimizer.param_groups[1]["lr"] = 1e-4
        train(model, optimizer, 1)
        assert optimizer.run.groups["adamw"]["lr"] == 1e-4


def test_what_a_preset_leaves_open_and_what_is_given_beside_it(shared: Service, name: str) -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    coefficients = ((3.0, -4.0, 2.0), (2.0, -1.5, 0.5))
    groups = [{"parameters": "w", "preset": "deepseek-v4", "ns_coefficients": coefficients, "name": "own"}]
    with Optimizer([("w", weight)], groups, url=shared.url, run=name) as optimizer:
        weight.grad = torch.ones(4, 4)
        optimizer.step()
        # As many steps as the given coefficients have, not those of the preset's own.
        assert optimizer.run.groups["own"]["ns_steps"] == 2
    for preset, words in (
        (
            {"preset": "kimi"},
            "has the preset 'kimi', the service has deepseek-v4, diloco, kimi-k2, moonlight, muloco, nanogpt, torch",
        ),
        ({"preset": "kimi-k2", "algorithm": "sgd"}, "'kimi-k2' has no values for 'sgd', only for muonclip, adamw"),
    ):
        with pytest.raises(ValueError, match=words):
            Optimizer([("w", weight)], [{"parameters": "w", **preset}], url=shared.url)


def test_a_preset_without_a_service_is_heard_of_at_once(start: Any) -> None:
    service = start()
    service.kill()
    with pytest.raises(MuondError, match="GET /v1/capabilities at"):
        Optimizer([("w", nn.Parameter(torch.ones(4, 4)))], [{"parameters": "w", "preset": "torch"}], url=service.url)
