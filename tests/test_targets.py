"""Every way to write a target, read against sites whose meaning is known."""

from __future__ import annotations

import re

import pytest

from lora2fx.errors import TargetError
from lora2fx.site import ROLES, Layout, Site
from lora2fx.targets import names_site, needs_roles, read_target, read_targets


def site(weight: str, role: str = "unknown", shape: tuple[int, ...] = (32, 32)) -> Site:
    owner, _, parameter = weight.rpartition(".")
    return Site(weight, owner, parameter, shape, Layout(contracted=(1,), free=(0,)), role=role)


QUERY = site("bert.encoder.layer.1.attention.self.query.weight", "query")
DENSE = site("bert.encoder.layer.1.attention.output.dense.weight", "output")
DOWN = site("bert.encoder.layer.1.output.dense.weight", "ffn.down")
HEAD = site("lm_head.weight", "lm_head")
RAW = site("0.wq", "query", (32, 4, 8))
ROOT = site("weight")
CONV = site("stem.weight", "conv", (8, 3, 3, 3))
PATCH = site("patch.weight")
ALL = (QUERY, DENSE, DOWN, HEAD, RAW, ROOT, CONV, PATCH)


def matched(text: str) -> set[str]:
    target = read_target(text)
    return {site.weight for site in ALL if target.matches(site)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("query", {QUERY, RAW}),
        ("role:query", {QUERY, RAW}),
        ("name:query", {QUERY}),
        ("attention", {QUERY, RAW, DENSE}),
        ("ffn", {DOWN}),
        ("ffn.down", {DOWN}),
        ("ffn.up", set()),
        ("lm_head", {HEAD}),
        ("unknown", {ROOT, PATCH}),
        ("dense", {DENSE, DOWN}),
        ("output.dense", {DENSE, DOWN}),
        ("attention.output.dense", {DENSE}),
        ("attention.output.dense.weight", {DENSE}),
        ("bert.encoder.layer.1.output.dense", {DOWN}),
        ("ense", set()),
        ("Dense", set()),
        ("wq", {RAW}),
        ("0.wq", {RAW}),
        ("0", {RAW}),
        ("encoder.*.dense", {DENSE, DOWN}),
        ("layer.?.output.dense", {DOWN}),
        ("layer.[02].output.dense", set()),
        ("coder.*.dense", set()),
        ("*", set(ALL)),
        ("all-linear", {QUERY, DENSE, DOWN, ROOT, PATCH}),
        ("name:all-linear", set()),
        (r"re:.*\.(query|dense)", {QUERY, DENSE, DOWN}),
        (r"re:bert\.encoder\.layer\.1\.output\.dense\.weight", {DOWN}),
        ("re:query", set()),
        ("name:weight", {site for site in ALL if site.parameter == "weight"}),
    ],
)
def test_an_expression_means_these_sites_and_no_others(text: str, expected: set[Site]) -> None:
    assert matched(text) == {site.weight for site in expected}


def test_a_callable_sees_the_site() -> None:
    target = read_target(lambda site: site.shape[0] == 8)
    assert [site for site in ALL if target.matches(site)] == [CONV]


def test_every_role_can_be_asked_for() -> None:
    for role in ROLES:
        assert read_target(role).matches(site("a.weight", role))
        assert read_target(f"role:{role}").by_role


def test_a_single_expression_is_a_list_of_one() -> None:
    assert [target.text for target in read_targets("query")] == ["query"]
    assert [target.text for target in read_targets(["query", "wq"])] == ["query", "wq"]
    assert [target.text for target in read_targets(target for target in ("query",))] == ["query"]
    assert len(read_targets(lambda site: True)) == 1
    assert read_targets(()) == ()


@pytest.mark.parametrize(
    ("targets", "needed"),
    [
        ("query", True),
        ("ffn", True),
        ("role:lm_head", True),
        ("all-linear", True),
        (["q_proj", "ffn.up"], True),
        ("name:query", False),
        (["q_proj", "encoder.*.dense", r"re:.*\.fc1"], False),
        (lambda site: site.role == "query", False),
        ((), False),
    ],
)
def test_only_roles_need_a_recording(targets: object, needed: bool) -> None:
    assert needs_roles(targets) is needed


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("", "target '' is empty. Name a role or a module"),
        ("role:", "target 'role:' is empty"),
        ("re:", "target 're:' is empty"),
        ("role:querry", "target 'role:querry': 'querry' is no role. Roles: attention, ffn, query, key"),
        ("role:q_proj", "'q_proj' is no role"),
        ("re:(", r"target 're:\(' is no regular expression: missing \)"),
        ([3], "a target is a string or a callable .* not 3 of type int"),
        ([["query"]], r"not \['query'\] of type list"),
        (None, r"targets is a NoneType. Pass a list, as in targets=\['query', 'ffn'\]"),
    ],
)
def test_an_unreadable_target_is_an_error(targets: object, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        read_targets(targets)


def test_names_never_match_part_of_a_name() -> None:
    """PEFT's own trap: "fc" must not reach "subfc"; a dot must be a dot."""
    assert names_site("fc", site("sub.fc.weight"))
    assert not names_site("fc", site("sub.subfc.weight"))
    assert not names_site("a.b", site("aXb.weight"))
    assert not names_site("", ROOT)


def test_regexes_of_peft_mean_the_same_here() -> None:
    """PEFT matches a string `target_modules` with fullmatch on the module's path."""
    from peft.tuners.tuners_utils import check_target_module_exists

    class Config:
        layers_to_transform = exclude_modules = None

    for pattern in (r".*\.(query|dense)", r".*layer\.1.*dense", "query", r".*query"):
        Config.target_modules = pattern
        expected = {site.weight for site in ALL if bool(check_target_module_exists(Config, site.owner))}
        assert matched(f"re:{pattern}") == expected


def test_suffixes_of_peft_mean_the_same_here() -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    class Config:
        layers_to_transform = layers_pattern = exclude_modules = None

    for suffix in ("dense", "output.dense", "attention.output.dense", "self.query", "stem", "ense", "layer.1"):
        Config.target_modules = {suffix}
        expected = {site.weight for site in ALL if bool(check_target_module_exists(Config, site.owner))}
        assert matched(suffix) == expected, suffix


def test_a_role_error_names_every_role() -> None:
    with pytest.raises(TargetError) as caught:
        read_target("role:nothing")
    assert all(re.search(rf"\b{re.escape(role)}\b", str(caught.value)) for role in ROLES)
