"""Schedules: published lists against numbers measured elsewhere, tails, the generator, and what is refused and why."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import torch

from spectral_kernels.ops import arithmetic, schedules, validation
from spectral_kernels.ops.polar_express import CLASSIC, best_quintic
from spectral_kernels.ops.polynomials import extremes
from spectral_kernels.ops.schedules import (
    ALIASES,
    PUBLISHED,
    Schedule,
    checked,
    polar_express,
    properties,
    restarts_for,
    schedule,
    validate,
)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [BF16, FP16, FP32, FP64]
NO_HEADROOM = ["polar_express_8_unscaled", "polar_express_5_unscaled", "cans_5"]
SOUND = [n for n in PUBLISHED if n not in (*NO_HEADROOM, "aol_4_old", "cubic5")]
HARNESS = ((3.4, -4.7, 2.0), 6)  # the coefficients of PyTorch's optimizer harness for Muon

# By a scalar recursion in float64 written apart from this package, extrema refined, thresholds by bisection: six
# significant digits, eight for thresholds. (name, steps): output range for inputs from 1e-3, 0.01, 0.1 to 1, slope,
# largest safe input, divergence, sign flip, smallest input reaching 0.5, 0.7, 0.9, largest intermediate.
# fmt: off
EXPECTED = {
    ("keller_quintic", None): (
        0.470544, 1.20237, 0.681831, 1.13436, 0.681831, 1.13436, 484.876,
        1.2637751, 1.2637751, None, 0.00106703, None, None, 1.20237,
    ),
    ("keller_quintic", 8): (
        0.681831, 1.13436, 0.681831, 1.13436, 0.681831, 1.13436, 19815.7,
        1.2637292, 1.2637292, None, 2.61094e-05, 0.862363, 0.868838, 1.20237,
    ),
    ("youjiacheng_5", None): (
        0.474982, 1.14502, 0.977751, 1.03178, 0.977751, 1.03178, 492.75,
        1.3246168, 1.3246168, None, 0.00105721, 0.00155102, 0.00216299, 1.27314,
    ),
    ("youjiacheng_6", None): (
        0.866304, 0.999335, 0.995589, 0.999335, 0.995589, 0.999335, 1137.45,
        1.0829725, 1.0829725, None, 0.000468481, 0.000710045, 0.00108498, 1.27246,
    ),
    ("polar_express_8_unscaled", None): (
        1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 6822.42,
        1.0000042, 1.0000042, None, 7.88893e-05, 0.000121237, 0.000192447, 1.99171,
    ),
    ("polar_express_5_unscaled", None): (
        0.876441, 1.12356, 0.876441, 1.12356, 0.876441, 1.12356, 1026.06,
        1.0000069, 1.0000069, None, 0.00050761, 0.000744773, 0.999994, 1.99171,
    ),
    ("polar_express_8_s101", None): (
        1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 6363.39,
        1.0109155, 1.0109155, None, 8.45911e-05, 0.000130023, 0.000206497, 1.99171,
    ),
    ("polar_express_8_s101", 10): (
        1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 22371.3,
        1.0109154, 1.0109154, None, 2.4077e-05, 3.70407e-05, 5.89641e-05, 1.99171,
    ),
    ("polar_express_8_s101_rounded", None): (
        1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 6363.46,
        1.0109193, 1.0109193, None, 8.45903e-05, 0.000130021, 0.000206495, 1.99169,
    ),
    ("polar_express_5_s105", None): (
        0.729003, 1.12356, 0.846097, 1.12356, 0.846097, 1.12356, 803.949,
        1.0546826, 1.0546826, None, 0.000648121, 0.000951394, 0.991346, 1.99171,
    ),
    ("polar_express_5_safety2e2_cushion2", None): (
        0.858873, 1.14113, 0.858873, 1.14113, 0.858873, 1.14113, 989.468,
        1.0218172, 1.0218172, None, 0.000525546, 0.000769434, None, 1.99168,
    ),
    ("polar_express_8_safety1e2", None): (
        1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 6533.49,
        1.0109041, 1.0109041, None, 8.23861e-05, 0.000126628, 0.000201081, 1.99168,
    ),
    ("polar_express_8_safety2e2", None): (
        1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 6229.46,
        1.021816, 1.021816, None, 8.64145e-05, 0.000132835, 0.000211008, 1.99168,
    ),
    ("cans_5", None): (
        0.884374, 1.11984, 0.884374, 1.11984, 0.884374, 1.11984, 1048.94,
        1.0000078, 1.0000078, None, 0.000497045, 0.000730273, 0.999996, 1.99152,
    ),
    ("cans_5", 8): (
        1.00687, 1.05462, 1.00687, 1.05462, 1.00687, 1.05462, 12329.6,
        1.0000064, 1.0000064, None, 4.25091e-05, 6.28505e-05, 8.91087e-05, 1.99152,
    ),
    ("aol_4_old", None): (
        -1.08444, 1.08444, -1.08444, 1.08444, -1.08444, 1.08444, 104.065,
        0.88369806, 1.1806013, 0.88369806, None, None, None, 1.20842,
    ),
    ("aol_4_fixed", None): (
        0.146595, 1.05001, 0.94094, 1.05001, 0.94094, 1.05001, 147.169,
        1.1044082, 1.1044082, None, 0.00357012, 0.00530224, 0.00763674, 1.71183,
    ),
    ("deepseek_v4_10", None): (
        1.0, 1.00054, 1.0, 1.00054, 1.0, 1.00054, 79262.8,
        1.2637291, 1.2637291, None, 6.75076e-06, 1.02888e-05, 1.59432e-05, 1.20237,
    ),
    ("cubic5", None): (
        0.11914, 1.3, 0.774106, 1.3, 0.774106, 1.3, 119.324,
        1.0035183, 1.1828991, 1.0035183, 0.00431292, 0.0062306, None, 1.3,
    ),
    ("cubic", None): (
        0.00759364, 1.0, 0.0758229, 1.0, 0.658719, 1.0, 7.59375,
        1.7320508, 2.2360368, 1.7320508, 0.0708738, 0.108912, 0.172842, 1.0,
    ),
    ("cubic", 20): (
        0.999936, 1.0, 1.0, 1.0, 1.0, 1.0, 3325.26,
        1.7320508, 2.236068, 1.7320508, 0.000162069, 0.000249509, 0.000397909, 1.0,
    ),
    ("classic_quintic", None): (
        0.023171, 1.0, 0.228493, 1.0, 0.995849, 1.0, 23.1743,
        1.5283361, 1.5283361, None, 0.0232407, 0.0357499, 0.0568915, 1.0,
    ),
    ("classic_quintic", 12): (
        0.980765, 1.0, 1.0, 1.0, 1.0, 1.0, 1888.06,
        1.5275254, 1.5275254, None, 0.000285301, 0.000438948, 0.000698894, 1.0,
    ),
}
# fmt: on


@pytest.mark.parametrize("key", EXPECTED, ids=str)
def test_properties_are_those_measured_elsewhere(key):
    p = properties(schedule(*key))
    found = [*p.output, *p.output_from_0_01, *p.output_from_0_1, p.slope, p.largest_safe_sigma, p.divergence_sigma]
    found += [p.sign_flip_sigma, p.reaching_0_5, p.reaching_0_7, p.reaching_0_9, p.max_intermediate]
    for i, (mine, theirs) in enumerate(zip(found, EXPECTED[key], strict=True)):
        assert (mine is None) == (theirs is None), i
        # half a unit of the last digit given, 6 or 8
        assert mine is None or mine == pytest.approx(theirs, rel=6e-8 if i in (7, 8, 9) else 6e-6), i


def test_every_list_says_where_it_comes_from():
    assert len(PUBLISHED) == 18 and set(ALIASES.values()) <= set(PUBLISHED)
    for name, one in PUBLISHED.items():
        assert one.name == name and one.source and one.tail in ("exact", "truncate", "repeat_last", "cycle")
        assert hash(one) == hash(dataclasses.replace(one)) and 0 <= one.interval[0] < one.interval[1] == 1
    # digits as published: integers over 1024, and quotients by the safety factor
    assert [a * 1024 for a, _, _ in PUBLISHED["youjiacheng_6"].steps] == [3955, 3735, 3799, 4019, 2677, 2172]
    unscaled = PUBLISHED["polar_express_5_unscaled"].steps
    quotients = [(a / 1.05, b / 1.05**3, c / 1.05**5) for a, b, c in unscaled]
    np.testing.assert_allclose(PUBLISHED["polar_express_5_s105"].steps, quotients, rtol=1e-14)


def test_a_schedule_is_its_polynomials_one_after_another():
    one = Schedule("two", ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0)))
    s = np.array([[0.0, 0.3], [1.0, -0.7]])
    f = 2 * s - 1.5 * s**3 + 0.5 * s**5
    np.testing.assert_allclose(one(s), 1.5 * f - 0.5 * f**3, rtol=1e-15)
    assert one.slope == 3 and len(one) == 2 and one(s).shape == s.shape
    assert one(1e300) == math.inf and np.isnan(one(math.nan))


# -------------------------------------------------------------------------------------------------- names and tails


def test_names_triples_and_lists():
    assert schedule("polar_express") is PUBLISHED["polar_express_5_safety2e2_cushion2"]
    one = PUBLISHED["cubic"]
    assert schedule(one) is one and schedule(one, 2).steps == one.steps[:2]
    assert schedule((3.4, -4.7, 2.0)).steps == ((3.4, -4.7, 2.0),) * 5
    assert schedule([3, -4, 2], 7).steps == ((3.0, -4.0, 2.0),) * 7
    assert schedule([(2, -1.5, 0.5), [1.5, -0.5, 0]]).steps == ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0))
    assert schedule(np.float32([2, -1.5, 0.5]).tolist(), 1).slope == 2


def test_tails():
    steps = ((1.0, 0.0, 0.0), (2.0, 0.0, 0.0), (3.0, 0.0, 0.0))
    one = {tail: Schedule("x", steps, tail) for tail in ("exact", "truncate", "repeat_last", "cycle")}

    def slopes(tail: str, n: int | None) -> list[float]:
        taken = one[tail].take(n)
        assert taken.tail == "exact" and taken.name == "x"
        return [a for a, _, _ in taken.steps]

    assert all(slopes(tail, n) == [1, 2, 3] for tail in one for n in (3, None))
    assert [slopes(tail, 2) for tail in ("truncate", "repeat_last", "cycle")] == [[1, 2]] * 3
    assert slopes("repeat_last", 5) == [1, 2, 3, 3, 3] and slopes("cycle", 5) == [1, 2, 3, 1, 2]
    for tail, n in (("exact", 2), ("exact", 4), ("truncate", 4)):
        with pytest.raises(ValueError, match=rf"steps must be .*3.* for schedule 'x', not {n}"):
            one[tail].take(n)


@pytest.mark.parametrize(
    ("given", "steps", "error", "part"),
    [
        ("polar", None, ValueError, "'polar_express', 'keller_quintic', .*'classic_quintic', not 'polar'"),
        ("cubic", 0, ValueError, r"steps must be in \[1, 99\], not 0"),
        ("cubic", 100, ValueError, r"steps must be in \[1, 99\], not 100"),
        ("cubic", 2.0, TypeError, "steps must be an integer"),
        ((1.0, math.nan, 0.0), None, ValueError, "three finite numbers"),
        ([(1.0, math.inf, 0.0)], None, ValueError, "three finite numbers"),
        ((1.0, 2.0), None, ValueError, "three finite numbers"),
        ([(1.0, 2.0, 3.0, 4.0)], None, ValueError, "three finite numbers"),
        ([(1.0, 2.0, 3.0)], 2, ValueError, "steps must be 1 or None"),
        ([(1.0, 2.0, 3.0)] * 100, None, ValueError, "at most 99 steps, not 100"),
        ([(1.0, 2.0, "3")], None, TypeError, "triple of numbers"),
        (["abc"], None, TypeError, "triple of numbers"),
        ([], None, TypeError, "list without entries"),
        (None, None, TypeError, "not NoneType"),
        (3.0, None, TypeError, "not float"),
    ],
)
def test_what_is_no_schedule(given, steps, error, part):
    with pytest.raises(error, match=part):
        schedule(given, steps)


# --------------------------------------------------------------------------------------------------------- generator


@pytest.mark.parametrize(("lower", "upper"), [(1e-3, 1), (0.03, 1), (1e-4, 1.2), (0.5, 1.5), (0.9, 1), (2e3, 5e4)])
def test_the_best_quintic_equioscillates(lower, upper):
    (a, b, c), error = best_quintic(lower, upper)

    def residual(s):
        return 1 - s * (a + b * s**2 + c * s**4)

    turns = np.sqrt((-3 * b + np.array([-1, 1]) * math.sqrt(9 * b * b - 20 * a * c)) / (10 * c))
    points = np.array([lower, *turns, upper])
    assert (np.diff(points) > 0).all()
    np.testing.assert_allclose(residual(points), np.array([1, -1, 1, -1]) * error, atol=1e-12)
    low, high = extremes(residual, lower, upper)
    assert max(-low, high) == pytest.approx(error, abs=1e-12) and 0 < error < 1
    # no other odd quintic is closer: any change raises the error at one of the four points
    for change in np.random.default_rng(0).standard_normal((50, 3)) * [0.01, 0.01, 0.01]:
        x = points / upper
        moved = residual(points) - (change[0] * x + change[1] * x**3 + change[2] * x**5)
        assert (moved * [1, -1, 1, -1]).max() > error


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("polar_express_8_unscaled", {}, 1e-8),
        ("polar_express_8_safety1e2", {"safety": 1.01, "cushion": 0.02}, 2e-6),  # its last step ended its fit earlier
        ("polar_express_8_safety2e2", {"safety": 1.02, "cushion": 0.02}, 1e-7),
        ("polar_express_5_safety2e2_cushion2", {"safety": 1.02, "cushion": 0.02}, 1e-12),
    ],
)
def test_the_generator_makes_the_published_lists(name, options, tolerance):
    made = polar_express(steps=len(PUBLISHED[name]), **options)
    np.testing.assert_allclose(made.steps, PUBLISHED[name].steps, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("lower", "upper"), [(1e-3, 1.0), (0.03, 1.0), (1e-4, 1.2), (1e-9, 1.0), (0.4, 0.4)])
@pytest.mark.parametrize("cushion", [0.0, 0.02407327424182761, 0.2])
def test_more_steps_come_closer_to_one(lower, upper, cushion):
    errors = []
    for steps in range(1, 20):
        one = polar_express(lower, upper, steps, cushion=cushion)
        assert one.interval == (lower, upper) and len(one) == steps and one.tail == "exact"
        low, high = extremes(one, lower, upper)
        errors.append(max(1 - low, high - 1))
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors)), errors
    assert errors[-1] < 1e-9
    assert one.steps[-1] == pytest.approx(CLASSIC, abs=1e-4)


def test_a_cushion_widens_the_range_that_comes_out():
    plain, cushioned = polar_express(1e-3, steps=3, cushion=0), polar_express(1e-3, steps=3)
    assert cushioned.slope < plain.slope
    # greedy and best: without a cushion the least output of the interval is the largest there is
    assert extremes(plain, 1e-3, 1)[0] > extremes(cushioned, 1e-3, 1)[0]


def test_safety_is_headroom():
    for safety in (1.005, 1.02, 1.1):
        one = polar_express(safety=safety)
        assert properties(one).largest_safe_sigma == pytest.approx(safety, rel=0.01)
        assert f"safety {safety:g}" in one.note
    assert properties(polar_express()).largest_safe_sigma < 1.00001


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"lower": 0.0}, "lower must be a finite number above 0"),
        ({"lower": 0.5, "upper": 0.4}, "lower must not exceed upper"),
        ({"upper": math.inf}, "upper must be a finite number"),
        ({"lower": 1.0, "upper": 1e99}, "upper must be in"),
        ({"steps": 0}, "steps"),
        ({"cushion": 1.0}, r"cushion must be a number in \[0, 1\)"),
        ({"safety": 0.99}, "safety"),
    ],
)
def test_bad_intervals(options, part):
    with pytest.raises(ValueError, match=part):
        polar_express(**options)


# --------------------------------------------------------------------------------------------------------- validator


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SOUND)
def test_sound_lists_pass_in_every_arithmetic(name, dtype):
    found = validate(name, dtype=dtype)
    assert found.safe and found.reasons == () and found.restarts == ()
    assert found == checked(name, None, dtype, "standard", None)
    low, high = extremes(PUBLISHED[name], 0.05, 1)
    assert low - 0.05 < found.output[0] < found.output[1] < high + 0.05
    assert found.headroom == properties(PUBLISHED[name]).largest_safe_sigma
    # relative to the unit roundoff no list is much worse than another: 12 for the best, 250 for the steepest
    assert 0 < found.deviation < 500 * arithmetic.ROUNDOFF[dtype]
    points = restarts_for(name, dtype)
    in_gram = validate(name, dtype=dtype, method="gram")
    assert in_gram.safe and in_gram.restarts == points


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_coefficients_of_the_harness_pass(dtype):
    assert validate(*HARNESS, dtype=dtype).safe
    assert validate(HARNESS[0], 99, dtype=dtype).safe


@pytest.mark.parametrize("name", NO_HEADROOM)
def test_no_headroom_is_refused_where_inputs_are_rounded(name):
    for dtype in (BF16, FP16, FP32):
        for method in ("standard", "gram"):
            found = validate(name, dtype=dtype, method=method)
            assert not found.safe and "outputs pass 2 for inputs above 1.00000" in found.reasons[0]
        assert restarts_for(name, dtype) is None
    assert validate(name, dtype=FP64).safe and restarts_for(name, FP64) == ()
    with pytest.raises(ValueError, match=f"schedule '{name}' is not safe .*bfloat16.*outputs pass 2.*1 \\+ 0.0039"):
        checked(name, None, BF16, "standard", None)


def test_flipped_signs_are_refused():
    for dtype in DTYPES:
        (reason,) = validate("aol_4_old", dtype=dtype).reasons
        assert "flips the sign of inputs above 0.8836981 (outputs down to -1.08)" in reason
    # headroom 1.0035: less than bfloat16 rounds, more than float16 does
    assert "flips the sign of inputs above 1.003518" in validate("cubic5", dtype=BF16).reasons[0]
    assert validate("cubic5", dtype=FP16).safe and validate("cubic5", dtype=FP32).safe
    assert not validate((-1.0, 0.0, 0.0)).safe and not validate((0.0, 0.0, 0.0)).safe


def test_restarts_belong_to_one_schedule_and_dtype():
    # the points that gram-newton-schulz 0.1.6 takes by default, made for its list in float16
    assert validate("polar_express_5_s105", dtype=FP16, method="gram", restarts=[2]).safe
    assert restarts_for("polar_express_5_s105", FP16) == (2,)
    for name, dtype in (("polar_express_5_s105", BF16), ("polar_express_8_s101", FP16)):
        found = validate(name, dtype=dtype, method="gram", restarts=[2])
        assert not found.safe and "with restarts [2] the rounding of the Gram matrix" in found.reasons[0]
    with pytest.raises(ValueError, match="method 'gram'.*with no restarts the rounding of the Gram matrix in bfloat16"):
        checked("polar_express", None, BF16, "gram", ())
    assert restarts_for("polar_express", FP32) == () and len(restarts_for("polar_express_8_s101", FP32)) == 1


def test_no_set_of_fewer_restarts_validates():
    for name, dtype in (("keller_quintic", FP16), ("polar_express", FP16), ("youjiacheng_6", FP16), ("cubic5", FP16)):
        one = schedule(name)
        size = len(restarts_for(one, dtype))
        assert size > 0
        for fewer in itertools.combinations(range(1, len(one)), size - 1):
            assert not validate(one, dtype=dtype, method="gram", restarts=fewer).safe


def test_long_lists_have_restarts_too():
    points = restarts_for(schedule("keller_quintic", 60), FP32)
    assert points and validate("keller_quintic", 60, dtype=FP32, method="gram", restarts=points).safe


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"method": "gram", "restarts": [0, 5]}, r"restarts \[0, 5\] are not between steps: 5 steps have 1 to 4"),
        ({"method": "gram", "restarts": [1], "steps": 1}, "1 steps have none"),
        ({"restarts": [1]}, r"restarts \[1\] are for method 'gram'"),
    ],
)
def test_restarts_out_of_place(options, part):
    found = validate("cubic", **options)
    assert not found.safe
    with pytest.raises(ValueError, match=part):
        checked("cubic", options.get("steps"), FP32, options.get("method", "standard"), options["restarts"])


def test_bad_arguments():
    with pytest.raises(ValueError, match="dtype must be one of"):
        validate("cubic", dtype=torch.int8)
    with pytest.raises(ValueError, match="dtype must be one of"):
        restarts_for("cubic", torch.int8)
    with pytest.raises(ValueError, match="method must be one of"):
        validate("cubic", method="svd")
    with pytest.raises(TypeError, match="restarts must be an integer"):
        validate("cubic", method="gram", restarts=[1.5])


def test_what_leaves_the_range_of_float16_is_refused():
    steep = ((3.4445, -4.775, 2.0315),) * 4 + ((30.0, -60.0, 31.0),) * 2
    assert not validate("deepseek_v4_10", dtype=FP16, method="gram", restarts=[]).safe
    worst = (1.0, 0.0, 7e4)
    (reason,) = validation._worst_reasons(worst, FP16, (2,))
    assert "with restarts [2] the gain of small singular values reaches 70000; float16 ends at 65504" in reason
    assert validation._worst_reasons(worst, BF16) == []
    assert any("leave the range of float16" in r for r in validate(steep, dtype=FP16).reasons)


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        (lambda Y: -Y, "comes out reversed"),
        (lambda Y: 1.3 * Y, r"comes out as 1\.\d+; within 5% of it the polynomial takes"),
        (lambda Y: np.full_like(Y, np.nan), "leave the range"),
    ],
)
def test_a_wrong_arithmetic_is_seen(monkeypatch, wrong, part):
    true = arithmetic.standard
    monkeypatch.setattr(arithmetic, "standard", lambda *arguments: wrong(true(*arguments)))
    found = validation._validate.__wrapped__(schedule("youjiacheng_6").take(None), FP32, "standard", None)
    assert not found.safe
    assert any(re.search(part, reason) for reason in found.reasons), found.reasons


# -------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_that_of_torch(dtype):
    acc = np.float64 if dtype == FP64 else np.float32
    x = (np.random.default_rng(0).standard_normal(20000) * np.geomspace(1e-8, 3e5, 20000)).astype(acc)
    x = np.concatenate([x, acc([0, -0.0, np.inf, -np.inf, np.nan, 65519, 65520, 1 + 2**-8, 1 + 3 * 2**-8])])
    expected = torch.from_numpy(x).to(dtype).to(FP64).numpy()
    np.testing.assert_array_equal(arithmetic.rounded(x, dtype).astype(np.float64), expected)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_standard_recursion_errs_as_torch_does(dtype):
    one = schedule("polar_express")
    U, sigma, V = validation._spread(1.0)
    exact = (U * one(sigma)) @ V.T
    X = torch.from_numpy((U * sigma) @ V.T).to(dtype)
    for a, b, c in one.steps:
        A = X @ X.mT
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    mine = arithmetic.standard((U * sigma) @ V.T, one.steps, dtype)
    held = sigma >= 0.05

    def error(Y) -> float:
        return float(np.abs(np.diagonal(U.T @ (np.asarray(Y, np.float64) - exact) @ V))[held].max())

    assert error(X.double().numpy()) / 4 < error(mine) < 4 * error(X.double().numpy())


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_what_validates_stands_on_larger_matrices_and_what_does_not_diverges(dtype):
    one = schedule("polar_express")
    random = np.random.default_rng(3)
    X = random.standard_normal((512, 4)) @ random.standard_normal((4, 512))  # rank 4
    X /= np.linalg.norm(X)
    points = restarts_for(one, dtype)

    def largest(restarts) -> float:
        Y = arithmetic.gram(X, one.steps, dtype, restarts).astype(np.float64)
        return float(np.linalg.norm(Y, 2)) if np.isfinite(Y).all() else math.inf

    assert largest(points) < 1.25
    assert not validate(one, dtype=dtype, method="gram", restarts=()).safe
    assert largest(()) > 2
    U, S, Vh = np.linalg.svd(X)
    Y = arithmetic.gram(X, one.steps, dtype, points).astype(np.float64)
    assert np.abs(np.diagonal(U.T @ Y @ Vh.T)[:4] - one(S[:4])).max() < 0.1


def test_noise_is_that_of_rank_one():
    random = np.random.default_rng(5)
    X = random.standard_normal((64, 1)) * random.standard_normal((1, 128))
    X /= np.linalg.norm(X)
    for dtype in DTYPES:
        for name in ("keller_quintic", "polar_express", "cubic"):
            noise = validate(name, dtype=dtype).noise
            one = schedule(name)
            spurious = np.linalg.svd(arithmetic.standard(X, one.steps, dtype), compute_uv=False)[1]
            assert noise / 30 < spurious <= noise
            assert noise < 4 * one.slope * arithmetic.ROUNDOFF[dtype]


@pytest.mark.parametrize(
    ("steps", "tail", "error"),
    [
        ((), "exact", ValueError), (((1.5, -0.5, 0.0),) * 100, "exact", ValueError),
        (((1.5, -0.5),), "exact", ValueError), (((1.5, math.nan, 0.0),), "exact", ValueError),
        ((1.5, -0.5, 0.0), "exact", TypeError), (((1.5, -0.5, 0.0),), "repeat", ValueError),
    ],
)  # fmt: skip
def test_a_schedule_that_is_none(steps, tail, error):
    with pytest.raises(error, match="schedule|tail"):
        Schedule("mine", steps, tail)


def test_a_schedule_of_lists():
    assert Schedule("mine", [[1.5, -0.5, 0], [2, -1.5, 0.5]]).steps == ((1.5, -0.5, 0.0), (2.0, -1.5, 0.5))


def test_the_module_names_what_is_public():
    assert all(hasattr(schedules, name) for name in schedules.__all__)
