"""Every published list of coefficients that we know of, digit for digit, and how a caller names a schedule.

`properties` measures what a list does, `validate` whether an arithmetic carries it.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from .polynomials import Schedule, triple

DEFAULT_STEPS = 5  # of a single triple, as torch.optim.Muon

ALIASES = {"polar_express": "polar_express_5_safety2e2_cushion2"}

_EXPRESS = "arXiv 2505.16932"

_LISTS = (
    Schedule(
        "keller_quintic",
        ((3.4445, -4.775, 2.0315),) * 5,
        "repeat_last",
        (0.0, 1.0),
        (
            "KellerJordan/Muon muon.py @ 857d1ad",
            "torch 2.13.0 torch/optim/_muon.py (DEFAULT_A/B/C)",
            "MoonshotAI/Moonlight examples/toy_train.py @ c2ad5b2",
            "nil0x9/flash-muon flash_muon/muon.py @ 80ac87f",
            "LIONS-EPFL/scion scion.py @ f58a393",
            'pytorch-optimizer 4.1.0 utils/matrix.py preset "original"',
            'NVIDIA-NeMo/Emerging-Optimizers muon_utils.py preset "simple" @ fd77292',
            'optax contrib.muon preset "standard" @ 2edbcbe',
            'heavyball 3.2.1 mode "legacy_newtonschulz"',
        ),
        note="Does not converge to 1: the output oscillates in its range. torch.optim.Muon's default.",
    ),
    Schedule(
        "youjiacheng_5",
        (
            (4.0848, -6.8946, 2.927),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        "exact",
        (0.0, 1.0),
        (
            "Dao-AILab/gram-newton-schulz coefficients.py YOU_COEFFICIENTS @ f08f25e",
            "microsoft/dion dion/newton_schulz_triton.py @ 0a059a4",
            'NVIDIA-NeMo/Emerging-Optimizers preset "quintic" (default) @ fd77292',
            'heavyball 3.2.1 mode "newtonschulz" (default)',
            'pytorch-optimizer 4.1.0 preset "quintic"',
            'optax contrib.muon preset "dion" @ 2edbcbe',
        ),
        note="Packages differ in the tail: exact (gram-newton-schulz, dion), cycle, or the last one repeated.",
    ),
    Schedule(
        "youjiacheng_6",
        (
            (3.8623046875, -8.111328125, 4.890625),
            (3.6474609375, -6.5244140625, 3.3818359375),
            (3.7099609375, -6.3466796875, 3.1357421875),
            (3.9248046875, -6.2353515625, 2.837890625),
            (2.6142578125, -2.9580078125, 1.134765625),
            (2.12109375, -1.7900390625, 0.666015625),
        ),
        "exact",
        (0.0, 1.0),
        ("modula-systems/modula modula/atom.py orthogonalize @ ede2ba7",),
        note="Integers over 1024.",
    ),
    Schedule(
        "polar_express_8_unscaled",
        (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            (1.875, -1.25, 0.375),
        ),
        "repeat_last",
        (1e-3, 1.0),
        ("heavyball 3.2.1 utils.py ABC_LIST (attributed there to the paper)",),
        paper=_EXPRESS,
        note="No headroom: inputs must not exceed 1.0000042. The last step is the classic quintic.",
    ),
    Schedule(
        "polar_express_5_unscaled",
        (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        ),
        "exact",
        (1e-3, 1.0),
        ("Dao-AILab/gram-newton-schulz coefficients.py (constants before the division by 1.05) @ f08f25e",),
        paper=_EXPRESS,
        note="No headroom: inputs must not exceed 1.0000069.",
    ),
    Schedule(
        "polar_express_8_s101",
        (
            (8.205160414005574, -22.90193498705605, 16.460724910180314),
            (4.066395159942775, -2.8611540867551426, 0.5183995226694741),
            (3.9095949044379155, -2.823351735039516, 0.5250369769390025),
            (3.2855640171986153, -2.415301959635945, 0.48529406552790866),
            (2.277873287083977, -1.619821765265441, 0.39848078704168355),
            (1.8725756512746514, -1.2307042574884297, 0.35851616209511666),
            (1.856437109755889, -1.2132392819185351, 0.35679978941375945),
            (1.875, -1.25, 0.375),
        ),
        "repeat_last",
        (1e-3, 1.0),
        ("heavyball 3.2.1 utils.py ABC_LIST_STABLE (msign, run with 10 steps)",),
        paper=_EXPRESS,
        note="Safety 1.01 in all steps but the last: a / s, b / s^3, c / s^5.",
    ),
    Schedule(
        "polar_express_8_s101_rounded",
        (
            (8.2051, -22.9019, 16.4607),
            (4.0664, -2.8612, 0.5184),
            (3.9096, -2.8234, 0.525),
            (3.2856, -2.4153, 0.4853),
            (2.2779, -1.6198, 0.3985),
            (1.8726, -1.2307, 0.3585),
            (1.8564, -1.2132, 0.3568),
            (1.875, -1.25, 0.375),
        ),
        "repeat_last",
        (1e-3, 1.0),
        (
            'NVIDIA-NeMo/Emerging-Optimizers muon_utils.py preset "polar_express" @ fd77292',
            "Unakar/Spectral-Sphere-Optimizer sso.py @ 304d7a4",
        ),
        paper=_EXPRESS,
        note="Four decimals; the first a is published as 8.2051, where rounding gives 8.2052.",
    ),
    Schedule(
        "polar_express_5_s105",
        (
            (7.892582874424408, -20.38301394587957, 13.555306149406924),
            (3.911484868135431, -2.5464635929060884, 0.4268988319673074),
            (3.760657955697423, -2.512819018216563, 0.4323647349070073),
            (3.160399673686287, -2.149649518898498, 0.3996366907664389),
            (2.1910971618617303, -1.441662010214663, 0.328146487623155),
        ),
        "exact",
        (1e-3, 1.0),
        ("Dao-AILab/gram-newton-schulz 0.1.6 coefficients.py POLAR_EXPRESS_COEFFICIENTS",),
        paper=_EXPRESS,
        note="Safety 1.05 in all five steps (its docstring says 1.01).",
    ),
    Schedule(
        "polar_express_5_safety2e2_cushion2",
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        "exact",
        (1e-3, 1.0),
        (
            "KellerJordan/modded-nanogpt train_gpt.py @ f411b3d",
            "microsoft/dion dion/polar_express.py @ 0a059a4",
            "karpathy/nanochat optim.py @ 92d63d4",
        ),
        paper=_EXPRESS,
        note="Safety 1.02 in all steps but the last, cushion 0.02. Its users divide the input by 1.01 or 1.02 besides.",
    ),
    Schedule(
        "polar_express_8_safety1e2",
        (
            (8.237312490495555, -23.157747414558198, 16.680568411445915),
            (4.082441999064835, -2.893047735332586, 0.5252849256975648),
            (3.9263479922546582, -2.8547468034765298, 0.5318022422894988),
            (3.2982187133085143, -2.424541981026706, 0.48632008358844075),
            (2.2970369434552573, -1.63662558125903, 0.4002628455953627),
            (1.8763805351440397, -1.2347896577722228, 0.35891887501668385),
            (1.8564423485617974, -1.2132449880935525, 0.3568003487825883),
            (1.8749994008682747, -1.2499988017229169, 0.3749994008546422),
        ),
        "repeat_last",
        (1e-3, 1.0),
        ('pytorch-optimizer 4.1.0 utils/matrix.py preset "polar_express"',),
        paper=_EXPRESS,
        note="Safety 1.01 in all steps but the last, cushion 0.02.",
    ),
    Schedule(
        "polar_express_8_safety2e2",
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.0429299351667245, -2.808917465908704, 0.5000178451051299),
            (3.8916678022926563, -2.7724841532176825, 0.5060648178503389),
            (3.285753657755658, -2.3681294933425394, 0.46449024233003117),
            (2.3005307116270983, -1.6111665557258408, 0.3833374427545273),
            (1.8631210546382593, -1.2042160621002727, 0.3421879560523383),
            (1.8382572152247512, -1.1779263289537742, 0.3396513038637379),
            (1.8749999923301852, -1.2499999836060613, 0.374999991275876),
        ),
        "repeat_last",
        (1e-3, 1.0),
        ('pytorch-optimizer 4.1.0 utils/matrix.py preset "polar_express_safer"',),
        paper=_EXPRESS,
        note="Safety 1.02 in all steps but the last, cushion 0.02.",
    ),
    Schedule(
        "cans_5",
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.563),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        "repeat_last",
        (0.0, 1.0),
        ('NVIDIA-NeMo/Emerging-Optimizers muon_utils.py preset "cans" @ fd77292',),
        paper="arXiv 2506.10935",
        note="No headroom: inputs must not exceed 1.0000078. Repeating the last step does not converge to 1.",
    ),
    Schedule(
        "aol_4_old",
        (
            (4.0098, -7.0585, 2.4635),
            (3.4585, -5.5479, 2.5959),
            (2.7573, -3.2939, 1.4254),
            (2.7215, -3.0494, 1.3169),
        ),
        "cycle",
        (0.0, 1.0),
        (
            'NVIDIA-NeMo/Emerging-Optimizers muon_utils.py preset "aol" @ fd77292',
            "thib-s/flash-newton-schulz first commit b73111d",
        ),
        paper="arXiv 2512.04632",
        note="Reverses every input above 0.8837; superseded by aol_4_fixed in its own repository.",
    ),
    Schedule(
        "aol_4_fixed",
        (
            (4.6051, -9.6552, 5.6769),
            (4.7505, -6.0861, 2.179),
            (2.7763, -2.319, 0.5523),
            (2.4231, -2.2861, 0.8193),
        ),
        "exact",
        (0.0, 1.0),
        (
            "thib-s/flash-newton-schulz @ cdb03db",
            "microsoft/dion dion/newton_schulz_triton.py newton_schulz_triton_fast @ 0a059a4",
        ),
        paper="arXiv 2512.04632",
        note="Made for inputs rescaled row by row; after division by the Frobenius norm small values stay low.",
    ),
    Schedule(
        "deepseek_v4_10",
        ((3.4445, -4.775, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2,
        "repeat_last",
        (0.0, 1.0),
        ('NVIDIA-NeMo/Emerging-Optimizers muon_utils.py preset "deepseekv4" @ fd77292',),
        note="Eight Keller steps, then 2 of (2, -1.5, 0.5).",
    ),
    Schedule(
        "cubic5",
        (
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.431257, 0.0),
            (2.4418906, -1.276404, 0.0),
            (2.2230472, -0.963065, 0.0),
        ),
        "exact",
        (0.0, 1.0),
        ('NVIDIA-NeMo/Emerging-Optimizers muon_utils.py preset "cubic5" @ fd77292 (exactly 5 steps enforced)',),
        paper="arXiv 2606.00371",
        note="c = 0: two products a step. Headroom 0.35 percent, less than the rounding of bfloat16.",
    ),
    Schedule(
        "cubic",
        ((1.5, -0.5, 0.0),) * 5,
        "repeat_last",
        (0.0, 1.0),
        (
            "textbook",
            "linkedin/Liger-Kernel PR 1449",
        ),
        note="Flips signs above sqrt(3), diverges above sqrt(5); slow: slope 1.5 a step.",
    ),
    Schedule(
        "classic_quintic",
        ((1.875, -1.25, 0.375),) * 5,
        "repeat_last",
        (0.0, 1.0),
        ("textbook; last step of the Polar Express lists",),
    ),
)
PUBLISHED: Mapping[str, Schedule] = MappingProxyType({one.name: one for one in _LISTS})


def schedule(given: Any, steps: int | None = None) -> Schedule:
    """What a caller means by a schedule, with that many steps by its tail rule (None: its own number).

    given: a name of PUBLISHED or ALIASES, a Schedule, one triple (a, b, c), used `steps` times (default 5), or a list
    of triples, used once each. ValueError: unknown name, numbers that are not finite, steps outside [1, 99] or other
    than the list allows. TypeError: anything else.
    """
    if isinstance(given, str):
        name = ALIASES.get(given, given)
        if name not in PUBLISHED:
            raise ValueError(f"schedule must be one of {', '.join(map(repr, (*ALIASES, *PUBLISHED)))}, not {given!r}")
        found = PUBLISHED[name]
    elif isinstance(given, Schedule):
        found = given
    else:
        found = _custom(given)
    return found if steps is None else found.take(steps)


def _custom(given: Any) -> Schedule:
    if not isinstance(given, Sequence) or isinstance(given, bytes) or not given:
        raise TypeError(
            f"schedule must be a name, a Schedule, a triple (a, b, c) or a list of triples, not {type(given).__name__}"
            + (" without entries" if isinstance(given, Sequence) else "")
        )
    if all(isinstance(entry, numbers.Real) for entry in given):
        one = triple(given)
        return Schedule(str(one), (one,) * DEFAULT_STEPS, "repeat_last")
    return Schedule(f"list of {len(given)}", tuple(given))


__all__ = ["ALIASES", "DEFAULT_STEPS", "PUBLISHED", "schedule"]
