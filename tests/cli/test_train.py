"""``wsbcn-train``: what is checked before a run knows what kind of run it is."""

from argparse import Namespace

import pytest

from wsbcn_d2.cli import train


@pytest.mark.parametrize("file", ["a.yaml", "a.py"])
def test_the_check_is_told_of_the_job(file, monkeypatch):
    asked = []
    for place, suffix, kind in ((train, "_config", ".yaml"), (train.lazy, "_lazy_config", ".py")):
        monkeypatch.setattr(place, f"load{suffix}", lambda *words, kind=kind: (kind, *words))
        monkeypatch.setattr(place, f"check{suffix}", lambda *cfg, **job: asked.append((*cfg, job)))
    job = {"world_size": 3, "eval_only": True, "resume": True}
    train.check(Namespace(config_file=file, opts=["KEY", "1"]), **job)
    assert asked == [((file[1:], file, ["KEY", "1"]), job)]
