"""Builds of data sets are timed as a user runs them."""

from __future__ import annotations

import random

from benchmarks import data_build


def test_each_case_builds_and_shows_in_the_table() -> None:
    records = [data_build.measure(case, 40) for case in data_build.CASES[::4]]
    for record in records:
        assert 0 < record.written <= record.rows == 40
        assert 0 < record.cpu_s and 10 < record.peak_mib
    machine = {"date": "d", "commit": "c", "processor": "p", "cores": 2}
    text = data_build.table(machine, records)
    assert (
        "| random words | 40 | 40 |" in text
        and "| one template, below the threshold | 40 |" in text
    )


def test_requests_of_the_cases_are_as_near_as_they_say() -> None:
    """Rows of one template are all near to one another, or none is."""
    from derta.data.records.duplicates import Fingerprint, RequestIndex

    for case, expected in zip(data_build.CASES[::2], (False, True, False), strict=True):
        index = RequestIndex()
        texts = [case.request(random.Random(seed), seed) for seed in range(30)]
        for number, text in enumerate(texts[1:]):
            index.add(str(number), Fingerprint([text]))
        assert index.has_match(Fingerprint([texts[0]])) == expected, case.name
