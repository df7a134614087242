// SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
/* The same for kernels that take no context in functions of their own, as 5.10: the verifier follows each call. */
#define OF_CONTEXT static __noinline
#include "dispatcher.bpf.c"
