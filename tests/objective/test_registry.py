from tests.objective import cases


def test_an_unknown_objective_is_one_line_with_the_nearest() -> None:
    assert cases.error_of("byol", objective__name="byoll") == (
        "objective.name: unknown objective 'byoll'; did you mean 'byol'?"
    )


def test_every_case_fits_its_tiny_run() -> None:
    assert {case: cases.error_of(case) for case in cases.CASES} == dict.fromkeys(cases.CASES, "")
