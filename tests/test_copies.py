"""Copies to a GPU beside its computation, on streams that are made up: whatever runs first, every step sees its own batch."""

import random
import time
from collections import deque

import numpy as np
import pytest
import torch
from helpers.cases import texture, write_case

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.training.copies import COPIED, DeviceBatches
from nnunetv2_cva.views.loader import Batches, Cases, PairDataset, make_loader


class Machine:
    """Two streams that do what they are told some time later: in any order that the events between them allow."""

    def __init__(self, seed, first=None):
        self.queues, self.done, self.random, self.first = {"compute": deque(), "copy": deque()}, [], random.Random(seed), first

    def tell(self, stream, work, name="", needs=None):
        event = Told(self, needs)
        self.queues[stream].append((event, work, name))
        return event

    def advance(self):
        """Do one thing that can be done; False: there is nothing."""
        ready = [s for s, queue in self.queues.items() if queue and (queue[0][0].needs is None or queue[0][0].needs.past)]
        if not ready:
            return False
        stream = self.first if self.first in ready else self.random.choice(ready)
        event, work, name = self.queues[stream].popleft()
        work()
        event.past = True
        self.done.append(name)
        return True

    def some_time_passes(self):
        for _ in range(self.random.randrange(4)):
            self.advance()


class Told:
    """A piece of work and the event behind it."""

    def __init__(self, machine, needs):
        self.machine, self.needs, self.past = machine, needs, False

    def synchronize(self):
        while not self.past:
            assert self.machine.advance(), "waits for ever"


class FakeLane:
    """What ``Lane`` does, on such a machine. ``forgotten``: the one rule that is not kept."""

    def __init__(self, machine, forgotten):
        self.machine, self.forgotten = machine, forgotten

    def room(self, like):
        return np.full_like(like, -1)

    def now(self):
        return self.machine.tell("compute", lambda: None)

    def copy(self, pairs, after):
        def work():
            for destination, source in pairs:
                destination[:] = source

        copied = self.machine.tell("copy", work, f"copy {int(pairs[0][1][0])}", None if self.forgotten == "after" else after)
        if self.forgotten != "synchronize":
            return copied
        copied.synchronize = lambda: None
        return copied

    def hold(self, copied):
        self.machine.tell("compute", lambda: None, needs=None if self.forgotten == "hold" else copied)


class Loader:
    """Writes every batch into the same memory, as soon as it is asked for it."""

    def __init__(self):
        self.step, self.waited, self.workers, self.prepared, self.closed = -1, 0.0, 3, 6, False
        self.memory = {name: np.zeros(1) for name in COPIED}

    def __next__(self):
        self.step += 1
        for array in self.memory.values():
            array[:] = self.step
        return {**self.memory, "keys": ["a"], "step": self.step}

    def close(self):
        self.closed = True


def train(seed, forgotten=None, first=None, steps=12):
    """What every step sees of its batch, and the order in which the machine did things."""
    machine, seen = Machine(seed, first), []
    batches = DeviceBatches(Loader(), FakeLane(machine, forgotten))

    def step(place):
        seen.append([float(place[name][0]) for name in COPIED])
        place["views"][:] += 100  # augmentation works in place

    for number in range(steps):
        batch = next(batches)
        assert batch["step"] == number and batch["keys"] == ["a"]
        machine.tell("compute", lambda place=batch: step(place), f"step {number}")
        if first is None:
            machine.some_time_passes()
    while machine.advance():
        pass
    return seen, machine.done


@pytest.mark.parametrize("first", [None, "compute", "copy"])
def test_every_step_sees_its_own_batch_in_whatever_order_the_streams_run(first):
    for seed in range(100):
        assert train(seed, first=first)[0] == [[n, n, n] for n in range(12)]


@pytest.mark.parametrize("forgotten", ["after", "hold", "synchronize"])
def test_each_of_the_three_rules_is_needed(forgotten):
    wrong = [seed for seed in range(100) if train(seed, forgotten)[0] != [[n, n, n] for n in range(12)]]
    assert wrong


def test_a_batch_is_copied_while_the_step_before_it_has_not_begun():
    done = train(0, first="copy")[1]
    assert all(done.index(f"copy {n + 1}") < done.index(f"step {n}") for n in range(11))
    assert all(done.index(f"step {n}") < done.index(f"copy {n + 2}") for n in range(10)), "two places, no more"


def test_the_rest_is_the_loaders():
    loader = Loader()
    batches = DeviceBatches(loader, FakeLane(Machine(0), None))
    next(batches)
    loader.waited = 2.0
    assert (batches.waited, batches.workers, batches.prepared) == (2.0, 3, 6) and iter(batches) is batches
    batches.waited = 0.0
    assert loader.waited == 0.0
    batches.close()
    assert loader.closed


class Late:
    """Copies as late as it may: when somebody waits for them."""

    def room(self, like):
        return torch.zeros_like(like)

    def now(self):
        return None

    def copy(self, pairs, after):
        return Waiting(pairs)

    def hold(self, copied):
        pass


class Waiting:
    def __init__(self, pairs):
        self.pairs = pairs

    def synchronize(self):
        for destination, source in self.pairs:
            destination.copy_(source)
        self.pairs = []


def test_the_loaders_processes_do_not_write_over_a_batch_that_is_being_copied(tmp_path):
    """They write ahead into memory that they share, batch after batch into the same."""
    for key in "abc":
        write_case(tmp_path, key, texture((20, 24, 22), seed=ord(key)))
    cases, config = Cases(tmp_path, list("abc")), CVAConfig(rotation_p=0.0, scale_p=0.0)
    dataset = PairDataset(cases, list("abc"), (12, 16, 10), config, 2, (0, 2), 0)
    batches = DeviceBatches(Batches(make_loader(dataset, 0, 12, 1, 2)[0]), Late())
    for number in range(12):
        found = next(batches)
        time.sleep(0.02)
        batches._copied.synchronize()
        expected = dataset[number]
        assert all(torch.equal(found[name], expected[name]) for name in COPIED)
    batches.close()
