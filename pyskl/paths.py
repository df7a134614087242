# SPDX-License-Identifier: BSD-2-Clause
"""Where a namespace's dispatcher is when nobody says where: a folder on bpffs, named by the namespace's inode."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pyskl.feature import BPFFS
from pyskl.netns import netns_fd

if TYPE_CHECKING:
    from pyskl.netns import NetNSLike

FOLDER = f"{BPFFS}/pyskl"


def default_path(netns: NetNSLike = None) -> str:
    """Tell the well-known folder of a network namespace, whether there is a dispatcher or not.

    Args:
        netns: the namespace; the calling thread's own where None.

    Raises:
        ValueError: it is not a network namespace.
        FileNotFoundError: there is nothing at the path.
    """
    with netns_fd(netns) as fd:
        return f"{FOLDER}/{os.fstat(fd).st_ino}"
