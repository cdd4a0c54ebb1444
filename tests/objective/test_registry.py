from tests.objective import cases


def test_unknown_objective_error_suggests_the_nearest() -> None:
    assert cases.error_of("byol", objective__name="byoll") == (
        "objective.name: unknown objective 'byoll'; did you mean 'byol'?"
    )


def test_every_test_case_has_a_valid_config() -> None:
    assert {case: cases.error_of(case) for case in cases.CASES} == dict.fromkeys(cases.CASES, "")
