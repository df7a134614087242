/* SPDX-License-Identifier: BSD-2-Clause */
/* Read a BPF ring buffer (Documentation/bpf/ringbuf.rst), which is mapped into memory: the reader's position, the writers'
 * position, and the data, which is there twice in a row so that no record is cut. */

#include <linux/bpf.h>
#include <stdint.h>
#include <string.h>

/* Copy up to `room` records of one size to `out`, and let go of them: how many. Others are passed over. */
int pyskl_ring_read(void *consumer, const void *producer, const void *data, uint32_t size_of_ring, void *out,
		    uint32_t size, uint32_t room)
{
	uint64_t read = __atomic_load_n((uint64_t *)consumer, __ATOMIC_ACQUIRE);
	uint64_t written = __atomic_load_n((const uint64_t *)producer, __ATOMIC_ACQUIRE);
	uint32_t count = 0;

	while (read < written && count < room) {
		const char *record = (const char *)data + (read & (size_of_ring - 1));
		uint32_t length = __atomic_load_n((const uint32_t *)record, __ATOMIC_ACQUIRE);

		if (length & BPF_RINGBUF_BUSY_BIT)
			break;
		if (!(length & BPF_RINGBUF_DISCARD_BIT) && length == size)
			memcpy((char *)out + (size_t)count++ * size, record + BPF_RINGBUF_HDR_SZ, size);
		length &= ~(BPF_RINGBUF_BUSY_BIT | BPF_RINGBUF_DISCARD_BIT);
		read += (length + BPF_RINGBUF_HDR_SZ + 7) / 8 * 8;
		__atomic_store_n((uint64_t *)consumer, read, __ATOMIC_RELEASE);
	}
	return count;
}
