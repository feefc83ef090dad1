"""Teachers alone: what they are asked, what a store then holds, and who needs them no more."""

import dataclasses

import pytest
from domains import PASSES, config_of, write_domain

from engine.config import UserError
from engine.label import label
from engine.run import distill

TRAIN, HELD_OUT = 192, 96  # images


@pytest.mark.ray
def test_what_is_labelled_beforehand_is_asked_of_nobody(local_ray, tmp_path, capsys):
    domain = write_domain(tmp_path / "domain")
    config = config_of(domain, tmp_path, "run", "--targets.store", str(tmp_path / "labels"))
    part = label(config, 3)
    assert part["blocks"] == 3 and part["labels"]["labelled"] == 3 * 32
    assert part["images"] == 2 * 32 and part["images_per_second"] > 0  # from the first label on
    rest = label(config, None)
    assert rest["labels"]["labelled"] == PASSES * TRAIN + HELD_OUT - 3 * 32
    told = dataclasses.replace(config.targets, source="store")
    summary = distill(dataclasses.replace(config, targets=told))
    seen = PASSES * (TRAIN - 1) + HELD_OUT  # one image cannot be decoded
    assert summary["labels"]["from_store"] == seen
    assert summary["labels"]["asked"] == 0 and "teachers" not in summary["labels"]
    with pytest.raises(UserError, match=r"targets\.source: store asks no teacher"):
        label(dataclasses.replace(config, targets=told), None)
