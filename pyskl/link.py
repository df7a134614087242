# SPDX-License-Identifier: BSD-2-Clause
"""Links: what keeps a program attached to a network namespace."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NamedTuple

from pyskl import _sys
from pyskl.enums import AttachType
from pyskl.errors import BpfError
from pyskl.netns import NetNSLike, netns_fd
from pyskl.pinning import KernelObject, fd_of_kind

if TYPE_CHECKING:
    from pyskl.program import Program


class LinkInfo(NamedTuple):
    """What the kernel says of a link (struct bpf_link_info).

    Attributes:
        id: by which `Link.from_id` opens it.
        type: a number of enum bpf_link_type.
        prog_id: of the program that it keeps attached.
        netns_inode: of the namespace; 0 when the namespace is gone or the link detached, None for another type of link.
        attach_type: `AttachType.SK_LOOKUP`, or None for another type of link.
    """

    id: int
    type: int
    prog_id: int
    netns_inode: int | None
    attach_type: AttachType | None


class Link(KernelObject):
    """A program attached to a network namespace.

    The kernel keeps it as long as an fd or a pin refers to it: closing an unpinned one detaches the program, closing a
    pinned one does not. Made by `Program.attach`.
    """

    _kind = "link"

    @property
    def info(self) -> LinkInfo:
        """What the kernel says of the link now (``BPF_OBJ_GET_INFO_BY_FD``)."""
        found = _sys.link_info(self.fileno())
        of_netns = found.type == _sys.LINK_TYPE_NETNS
        return LinkInfo(
            found.id,
            found.type,
            found.prog_id,
            found.netns_ino if of_netns else None,
            AttachType(found.attach_type) if of_netns else None,
        )

    def update(self, program: Program, *, expected: Program | None = None) -> None:
        """Put another program in the place of the one attached, in one step and without a gap (``BPF_LINK_UPDATE``).

        Args:
            program: the one from now on.
            expected: the one that the link must hold, else nothing changes.

        Raises:
            BpfError: the link holds another program than expected (EPERM); its namespace is gone, or it was detached
                (ENOLINK); the program is of another type (EINVAL).
        """
        old = None if expected is None else fd_of_kind(expected, "prog")
        _sys.link_update(self.fileno(), fd_of_kind(program, "prog"), old)

    def detach(self) -> None:
        """Detach the program, for all who hold the link (``BPF_LINK_DETACH``); once more does nothing."""
        _sys.link_detach(self.fileno())


def links(netns: NetNSLike = None) -> tuple[LinkInfo, ...]:
    """List the links by which sk_lookup programs are attached to a namespace, in the order of attachment.

    Args:
        netns: the namespace; the calling thread's own where None.

    Raises:
        PermissionDenied: the process lacks CAP_SYS_ADMIN, which opening by id needs.
    """
    with netns_fd(netns) as fd:
        inode = os.fstat(fd).st_ino
    found = []
    for number in _sys.link_ids():
        try:
            link = Link.from_id(number)
        except BpfError as error:
            if error.errno not in (errno.ENOENT, errno.EAGAIN):  # gone since, or not yet made
                raise
            continue
        with link:
            info = link.info
        if info.netns_inode == inode and info.attach_type == AttachType.SK_LOOKUP:
            found.append(info)
    return tuple(found)
