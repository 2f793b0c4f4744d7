"""READDIRPLUS replies overtaken by a change of the directory's names."""

from __future__ import annotations

from promisefs_client.fuse.listings import ListingsInFlight

DIRECTORY, OTHER = 5, 6


class Epochs:
    def __init__(self) -> None:
        self.bumps = 0
        self.listings = ListingsInFlight(self.bump)

    def bump(self) -> None:
        self.bumps += 1


def test_a_reply_that_was_overtaken_costs_one_more_epoch_when_it_is_parsed() -> None:
    epochs = Epochs()
    epochs.listings.sent(1, DIRECTORY)
    assert epochs.listings.overtake({DIRECTORY}) == {1}
    assert epochs.listings.pending({1})
    assert epochs.bumps == 0
    epochs.listings.parsed(1)
    assert epochs.bumps == 1
    assert not epochs.listings.pending({1})
    epochs.listings.parsed(1)
    assert epochs.bumps == 1


def test_a_reply_that_was_parsed_before_costs_nothing() -> None:
    epochs = Epochs()
    epochs.listings.sent(1, DIRECTORY)
    epochs.listings.parsed(1)
    assert not epochs.listings.overtake({DIRECTORY})
    assert epochs.bumps == 0


def test_replies_of_other_directories_are_not_waited_for() -> None:
    epochs = Epochs()
    epochs.listings.sent(1, OTHER)
    assert not epochs.listings.overtake({DIRECTORY})
    epochs.listings.parsed(1)
    assert epochs.bumps == 0


def test_each_of_several_overtaken_replies_is_made_up_for() -> None:
    epochs = Epochs()
    for handle in (1, 2):
        epochs.listings.sent(handle, DIRECTORY)
    assert epochs.listings.overtake({DIRECTORY}) == {1, 2}
    epochs.listings.parsed(1)
    assert epochs.listings.pending({1, 2})
    epochs.listings.parsed(2)
    assert epochs.bumps == 2


def test_a_reply_that_stays_unparsed_is_waited_for_once() -> None:
    epochs = Epochs()
    epochs.listings.sent(1, DIRECTORY)
    assert epochs.listings.overtake({DIRECTORY}) == {1}
    assert epochs.listings.overtake({DIRECTORY}) == set()
    epochs.listings.parsed(1)
    assert epochs.bumps == 1
