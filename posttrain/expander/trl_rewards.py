"""The values of a reward from which TRL's own formula makes this project's advantages."""

from __future__ import annotations

import numpy as np
import torch

from posttrain.training import advantages

TRL_EPSILON = 1e-4
"""What TRL adds to a group's standard deviation."""


def for_trl(values_N: np.ndarray, valid_N: np.ndarray, group_size: int, floor: float) -> np.ndarray:
    """Values of one reward from which TRL computes its advantages A by `advantages.standardise`, noise floor included.

    TRL computes (R - mean) / (std + 1e-4), for which a spread of 3e-5 is none, and has no floor. With R = mean + t A it
    is t A / (t std_A + 1e-4), which is A where t = 1e-4 / (1 - std_A); std_A is below 1, since A has an epsilon of its
    own. Groups of which TRL makes the same within a thousandth are left as they are. A flat group gets one number: its
    mean, rounded to 12 bits, so that the fp32 mean of equal numbers is exactly that number and the advantages are 0.
    """
    shape = (-1, group_size, 1)
    values_PG1, valid_PG1 = torch.from_numpy(values_N).view(shape), torch.from_numpy(valid_N).view(shape)
    wanted_N = advantages.standardise(values_PG1, valid_PG1, torch.tensor([floor])).flatten().numpy()
    result_N = values_N.copy()
    for first in range(0, len(values_N), group_size):
        rows = first + np.flatnonzero(valid_N[first : first + group_size])
        if not len(rows):
            continue
        mean, wanted = values_N[rows].mean(), wanted_N[rows]
        if not wanted.any():
            # Rounded relative to its size: 12 of the 24 bits of fp32 leave room for a sum over the group.
            fraction, exponent = np.frexp(mean)
            result_N[rows] = np.ldexp(np.round(np.ldexp(fraction, 12)), exponent - 12)
            continue
        # Most groups need nothing, and then TRL logs their own spread.
        # ddof=1: TRL takes the standard deviation with n - 1.
        usual = (values_N[rows] - mean) / (values_N[rows].std(ddof=1) + TRL_EPSILON)
        if np.abs(usual - wanted).max() > 1e-3 * np.abs(wanted).max():
            result_N[rows] = mean + wanted * TRL_EPSILON / (1 - wanted.std(ddof=1))
    return result_N
