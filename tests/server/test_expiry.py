"""Old results go by themselves."""

import os
import time
from pathlib import Path

from server.expiry import GRACE_S, Expiry
from server.store import ResultStore
from tests.server.conftest import poll


def test_results_past_their_time_go_and_the_others_stay(tmp_path: Path) -> None:
    store = ResultStore(tmp_path.as_uri())
    for key in ("img_old/1-0.png", "img_new/1-0.png"):
        store.put(key, b"x", "image/png")
    then = time.time() - GRACE_S - 60
    os.utime(tmp_path / "img_old/1-0.png", (then, then))
    expiry = Expiry(store, ttl_s=0.05)
    expiry.start()
    poll(lambda: not store.exists("img_old/1-0.png"))
    expiry.close()
    assert store.exists("img_new/1-0.png")


def test_store_that_does_not_answer_is_asked_again(tmp_path: Path) -> None:
    store = ResultStore((tmp_path / "out").as_uri())
    store.put("img_old/1-0.png", b"x", "image/png")
    then = time.time() - GRACE_S - 60
    os.utime(tmp_path / "out/img_old/1-0.png", (then, then))
    (tmp_path / "out").rename(tmp_path / "away")
    expiry = Expiry(store, ttl_s=0.05)
    expiry.start()
    (tmp_path / "away").rename(tmp_path / "out")
    poll(lambda: not store.exists("img_old/1-0.png"))
    expiry.close()
