"""Refusals for room and memory, at their limits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dist_esm.config import Config, Format, Include, Long, ModelConfig, SaveDtype
from dist_esm.jobs.plan.room import Room, refuse_too_little, remark_on_room, room_in
from dist_esm.jobs.plan.work import Work, output_of
from dist_esm.model.kernels.choose import PLAIN
from dist_esm.model.memory import device_memory, parameter_bytes, refuse_what_does_not_fit, size_in_words
from dist_esm.model.weights import load_model
from dist_esm.types import Count
from helpers.checkpoints import A8M

CPU = torch.device("cpu")
COUNT = Count(sequences=1000, residues=400_000, seen=300_000, num_long=100, headers=40_000)


def config_of(**settings) -> Config:
    model = ModelConfig("esm2_t6_8M_UR50D", 6, 320, 20, "random")
    return Config(input="a.fasta", output_dir=Path("out"), model=model, **settings)


def test_a_run_is_refused_only_if_nine_tenths_of_its_numbers_do_not_fit():
    numbers = 1000 * 320 * 4
    output = output_of(Work(1, COUNT, 1), config_of())
    assert output.least_bytes == 0.9 * numbers
    assert numbers < output.num_bytes < 1.2 * numbers
    refuse_too_little(output, Room(output.least_bytes, 1000, 4096), config_of())
    with pytest.raises(ValueError, match=r"has 1.15 MB free, and the numbers alone take 1.15 MB: name an"):
        refuse_too_little(output, Room(output.least_bytes - 1, 1000, 4096), config_of())
    refuse_too_little(output, Room(None, None, 4096), config_of())
    assert remark_on_room(output, Room(None, None, 4096)) is None
    assert remark_on_room(output, Room(2 * output.num_bytes, 1000, 4096)) is None
    assert "the disk may be full" in remark_on_room(output, Room(output.num_bytes, 1000, 4096))


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"save_dtype": SaveDtype.float16}, 1000 * 2),
        ({"include": [Include.per_tok]}, (1000 + 300_000) * 4),
        ({"include": [Include.per_tok], "long": Long.skip}, (900 + 200_000) * 4),
        ({"include": [Include.per_tok], "long": Long.window}, (1000 + 400_000) * 4),
        ({"include": [Include.mean, Include.bos], "repr_layers": [2, 6]}, 4000 * 4),
    ],
)
def test_numbers_follow_the_settings(settings, numbers):
    output = output_of(Work(1, COUNT, 1), config_of(truncation_seq_length=1000, **settings))
    assert output.least_bytes == round(0.9 * 320 * numbers)


def test_a_file_for_each_protein_needs_an_inode_for_each():
    config = config_of(format=Format.fair_esm)
    output = output_of(Work(1, COUNT, 1), config)
    assert output.files == 1003
    refuse_too_little(output, Room(None, 903, 4096), config)
    with pytest.raises(ValueError, match=r"room for 902 more files, and format=fair_esm writes 903 and more"):
        refuse_too_little(output, Room(None, 902, 4096), config)
    assert "there is room for 1,000" in remark_on_room(output, Room(None, 1000, 4096))


def test_the_room_is_that_of_the_file_system_of_a_directory_that_is_not_there(tmp_path):
    room = room_in(tmp_path / "not" / "there")
    assert room.num_bytes == pytest.approx(room_in(tmp_path).num_bytes, rel=0.1)
    assert not (tmp_path / "not").exists()
    assert room_in(tmp_path, 10**15).num_bytes > 10**15


def test_a_model_that_is_larger_than_the_memory_is_refused():
    model = load_model(ModelConfig("8M", 6, 320, 20, "random"), CPU, torch.float32, PLAIN)
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert parameter_bytes(A8M, torch.float32) == pytest.approx(held, rel=0.001)
    total, free = device_memory(CPU)
    assert 0 < free <= total
    fit = math.floor(total / parameter_bytes(A8M, torch.float32))
    refuse_what_does_not_fit("esm2_t6_8M_UR50D", A8M, CPU, torch.float32, fit)
    message = (
        rf"needs 29\.\d MB for its parameters for each of {fit + 1} ranks, and this host has .*: start fewer"
    )
    with pytest.raises(ValueError, match=message):
        refuse_what_does_not_fit("esm2_t6_8M_UR50D", A8M, CPU, torch.float32, fit + 1)


def test_sizes_are_said_as_people_say_them():
    said = {0: "0 B", 512: "512 B", 999.6: "1 kB", 12_345: "12.3 kB", 5_678_116_398: "5.68 GB"}
    assert {number: size_in_words(number) for number in said} == said
