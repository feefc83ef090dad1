"""Which teacher is asked for a label."""

import sys
from collections import Counter
from typing import Any

import pytest

from engine.labels.choice import Choice
from engine.labels.roster import Roster

TEACHERS = [f"t{number}" for number in range(16)]


def chooser(who: str = "me/0", shared: bool = False) -> Choice[str]:
    return Choice(who, str, shared)


def chosen(choice: Choice[str], labels: int, teachers: list[str], slack: int = 1) -> list[str]:
    """Of labels that are answered before the next one is asked for."""
    return [choice.of(number, teachers, {}, slack) for number in range(labels)]


def test_like_teachers_take_turns_and_workers_begin_with_different_ones():
    workers = [chosen(chooser(f"me/{rank}"), 32, TEACHERS) for rank in range(8)]
    for turns in workers:
        assert set(Counter(turns).values()) == {2} and turns[:16] == turns[16:]
    assert len({turns[0] for turns in workers}) > 3


def test_who_owes_the_least_of_its_time_is_asked():
    choice = chooser()
    for teacher, took_s in (("slow", 3.0), ("fast", 1.0)):
        choice.answered(teacher, took_s, behind=0)
    both = ["slow", "fast"]
    assert choice.of(0, both, {"fast": 1}, 1) == "fast"  # 2 s, against 3 s
    assert choice.of(1, both, {"fast": 3}, 1) == "slow"
    choice.answered("slow", 2.0, behind=1)  # 1 s a label: 0.7 * 3 + 0.3 * 1 = 2.4 s
    assert choice.of(2, both, {"fast": 2}, 1) == "slow"
    choice.failed("fast")  # now as slow as 4 times the fastest
    assert choice.of(3, both, {"slow": 0}, 1) == "slow"


def test_teachers_that_are_gone_count_no_more():
    choice = chooser()
    for teacher, took_s in (("gone", 1.0), ("slow", 9.0), ("slower", 30.0)):
        choice.answered(teacher, took_s, behind=0)
    both, owed = ["slow", "slower"], {"slow": 1}
    assert choice.of(0, both, owed, 1) == "slower"  # 4 s, against 8: at most 4 times the fastest
    choice.keep(both)
    assert choice.of(1, both, owed, 1) == "slow"  # 18 s, against 30


def test_students_prefer_the_same_teacher_for_a_label_unless_it_is_behind():
    mine, others = (chosen(chooser(who, shared=True), 64, TEACHERS) for who in ("a/0", "b/3"))
    assert mine == others and len(set(mine)) > 8
    fewer = [one for one in TEACHERS if one != mine[0]]
    without = chosen(chooser("a/0", shared=True), 64, fewer)
    moved = [before for before, now in zip(mine, without, strict=True) if before != now]
    assert set(moved) == {mine[0]}  # rendezvous: what one leaves goes elsewhere, and no more
    assert chooser(shared=True).of(0, TEACHERS, {mine[0]: 3}, 2) != mine[0]
    assert chooser(shared=True).of(0, TEACHERS, {mine[0]: 2}, 2) == mine[0]


@pytest.mark.parametrize("shared", [False, True])
def test_a_label_takes_one_look_at_each_teacher(shared: bool):
    """Twice as many teachers cost twice as much: no sum over all is made for each of them."""

    def calls(teachers: int) -> Counter[str]:
        choice, told = chooser(shared=shared), [str(number) for number in range(teachers)]
        for teacher in told:
            choice.answered(teacher, 1.0, 0)
        choice.of(0, told, {}, 1)
        seen: Counter[str] = Counter()

        def count(_: object, event: str, called: Any) -> None:
            if event == "c_call":
                seen[called.__name__] += 1

        sys.setprofile(count)
        choice.of(1, told, {}, 1)
        sys.setprofile(None)
        return seen

    few, many = calls(100), calls(200)
    assert few["sum"] == many["sum"] == 1
    assert few.total() < many.total() < 2 * few.total()


def test_a_roster_sends_its_teachers_to_who_does_not_know_them():
    roster = Roster()
    roster.set(("a and b",), "", ())
    first = roster.report("me/0", {}, "")
    assert first.teachers == ("a and b",)
    roster.set(("a and b",), "", ())
    assert roster.report("me/0", {}, first.version) == (first.version, None, "")
    roster.set(("a and c",), "some trouble", ())
    second = roster.report("me/0", {}, first.version)
    assert second.teachers == ("a and c",) and second.trouble == "some trouble"
    again = Roster()  # after its process has died, it has to be told, and to tell, anew
    again.set(("a and c",), "", ())
    assert again.report("me/0", {}, second.version).teachers == ("a and c",)
