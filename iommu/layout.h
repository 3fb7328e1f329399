/* The memory that dirtyring shares with devices: page tables, summary, generations, cells. This file is the ABI.
 *
 * An hwpt has two regions, a device has one:
 *
 *    tables (service rw, devices rw)          translation (service rw, devices ro)     cells (device rw, service reads)
 *    ┌─────────────────────────────┐          ┌─────────────────────────────┐          ┌───────────────────┐
 *    │ table bits   1 a table page │          │ header                      │          │ cell of thread 0  │
 *    │ line words  64 a table page │          │ shard controls              │          │ …                 │
 *    │ table pages  4 KiB each     │          │ generations  1 a region     │          │ pins of thread 0… │
 *    └─────────────────────────────┘          └─────────────────────────────┘          └───────────────────┘
 *
 * A table is named by its index t; a table entry holds t << 12 where hardware has the next table's address. The top
 * tables are those whose entries span 1 GiB or more, whatever leaves are used: they are built with the hwpt, stay, and
 * come first. Below, each shard has an index range of its own, so table bits, line words and generations have one owner
 * each; first_table is a multiple of 512, a cache line of table bits. The root of a page table with one or two levels
 * lies there, too, and stays:
 *
 *    t:   0 ........ top_tables | shard 0: first_table, … | shard 1: first_table, … | …
 *
 * The summary of a leaf in table t, entry e: bit e/8 of line word w, and table bit w, where w = t below the top. A top
 * table may be shared by several shards, so for a leaf in one (1 GiB) w = first_table of its shard + ((iova − slice
 * start) >> 39): these first indices of a shard's range have a word but no table page.
 *
 * All files are sparse, sealed against resizing, and mapped whole once; a table page exists before an entry points to
 * it. The lowest tables of each GiB begin at a multiple of 2 MiB of the file, and may lie in one page of that size: map
 * the file aligned. Every byte not named is zero and ignored.
 *
 * The invariant that everything else serves:
 *
 *    a leaf with D set  ⇒  its line and table bits are set, or it is in the owner's private pending mask,
 *                          or the thread that set D is still in its section, or the owner owes a full scan.
 *
 * Hence enabling cleans every leaf, before it arms or, where devices are armed always, before it advances; a dead
 * device owes a full scan; and every device must summarize.
 *
 * The section protocol. D: device thread, W: walker, C: consumer. "sc" is seq_cst.
 *
 *   D enter          cell: even → odd                                         store-sc          (S3)
 *     for each page:
 *     load           g = generation of the page's region                      load-sc           (S3)
 *     translate      IOTLB entry if its tag is g; else walk, tag it g         load-sc           (S6)
 *                    first the shard's context: it says whether to set A, D   load-sc           (S7)
 *     mark           first write through a clean entry:
 *                    leaf: A|D, compare-and-swap, only while it translates
 *                    as it did at the walk, else walk again                   RMW-sc            (S4)
 *                    line bit, if not yet set                                 load-sc, RMW-sc   (S4)
 *                    table bit, if not yet set                                load-sc, RMW-sc   (S4)
 *     data           write the guest's memory                                 plain             (S1)
 *   D leave          cell: odd → even                                         store-release     (S1)
 *     ring           if it turned a table bit from 0 to 1: asleep of that shard not DR_AWAKE?  load-sc  (S5)
 *
 *   W take           table bits, then line words: exchange with 0             RMW-sc            (S4)
 *     read           leaves of the lines taken                                load-sc           (S4)
 *     stage          the runs                                                 (R2 of ring/layout.h)
 *     clear          D, where it was seen set. Where A is set, too, no
 *                    device has anything left to set: a store will do         store-release or RMW (S4), before
 *                                                                             the advance
 *     advance        generations of all regions the leaves overlap            RMW-sc            (S3)
 *     sample         cells, through the list read now                         load-sc           (S3)
 *     pass           each cell: even, or not the odd value sampled            load-acquire      (S1)
 *     publish                                                                 (R3 of ring/layout.h)
 *   C read the runs, copy the guest's memory                                                    (S2)
 *
 *   edge  why
 *   S1    D's leave releases its data; W's pass acquires it
 *   S2    W's publish releases what its pass acquired; C's load of head acquires it: C copies no older data
 *   S3    store buffering: D stores cell then loads generation; W advances generation then loads cell. Both sc, so
 *         either
 *         D sees the new generation and walks again (and sets D), or W sees D inside and waits
 *   S4    store buffering along the chain D-bit, line bit, table bit: D sets in that order and skips what it sees set;
 *         W takes in
 *         the opposite order, then reads. So W reads every D whose bits it took, and a D it missed has its bits set
 *         again
 *   S5    store buffering: D sets the table bit then loads asleep; W sets asleep then looks at the table bits
 *   S6    W stores a table or leaf entry with release at least, after the page it names is whole; D loads each level.
 *         sc also for a
 *         second reason: D may find the D that another set, and skip the summary; the other's enter must precede W's
 *         sample
 *   S7    W stores the context, then advances; D loads the generation, then the context: who sees the new generation
 *         sees it armed
 *
 *   S8    D loads breaking, walks, and where nothing is there loads it again; W makes it odd, takes an entry away, puts
 *         another
 *         there, makes it even. All sc: whoever missed the entry in between sees breaking odd, or changed, and looks
 *         again
 *
 * S1 speaks of ordinary stores: who writes the guest's memory with non-temporal ones fences them before leaving.
 *
 * The pin protocol, for DMA that is in flight without a section: a section over asynchronous I/O would hold up every
 * publication. Whoever takes translations away, or promises that DMA is over, waits for pins; publishing never does.
 *
 *   D pin, inside a section:
 *     take           slot: range, direction                                   store-release    (P4)
 *                    pinned of the thread's cell: one more                    store-sc         (P1)
 *                    slot: count even → odd                                   store-sc         (P1)
 *     look           closing of each shard of the range                       load-sc          (P1)
 *                    does one of its ranges overlap? then give back, no translation
 *     translate      as above, and look at the rights; D stays as it is
 *   D unpin, inside a section, when the data has landed and before the guest is told:
 *     mark           as above, each leaf of a pin for writing; at all because the data came after any D that was there
 *     give back      slot: count odd → even                                   store-sc         (P2, P3)
 *                    pinned: one less                                         store-release
 *     leave, ring    as above; who gave back: asleep of the range's shards is DR_ASLEEP_PINS?  load-sc  (P3)
 *
 *   W unmap          close the range (closing)                                store-sc         (P1)
 *     sample         pinned of each cell; where it is not 0, the slots        load-sc          (P1)
 *     wait           until each slot in the range that was odd has changed    load-sc          (P2, P3)
 *     take out       the leaves, as without pins; then open the range         store-sc
 *   W sync           sample the slots for writing                             load-sc          (P1)
 *     wait           until each that was odd has changed                      load-sc          (P2, P3)
 *                    then the leading grace, then the pass
 *   W device dead    what its odd slots for writing cover is dirty
 *
 *   P1    store buffering: D stores its slot then loads closing; W stores closing then loads slots. So either D sees
 *         that the range is
 *         closed, or W sees the slot and waits. What a pin translated to stays until it is given back
 *   P2    D's give-back releases its D bits and summary; W's wait acquires them: an unmap finds the D of every pin it
 *         waited for. (A
 *         sync's grace comes behind its pins: one may have found D set by a thread that has not come to the summary)
 *   P3    store buffering: D gives back then loads asleep; W sets asleep then looks at the slots
 *   P4    W loads a slot's range with acquire, then its count again: unchanged, the range belongs to it
 *
 * What a hostile device may write, and what comes of it: summary bits of tables and lines that do not exist are masked
 * away; a cell that stays odd holds up its own guest; entries are reported only where something is mapped; table
 * pointers are never followed by the service. All of it harms the device's own guest only.
 */
#ifndef DIRTYRING_IOMMU_LAYOUT_H
#define DIRTYRING_IOMMU_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
#define DR_IOMMU_ASSERT(cond, why) static_assert(cond, why)
#define DR_IOMMU_ALIGN alignas(128)
extern "C" {
#else
#include <assert.h>
#define DR_IOMMU_ASSERT(cond, why) _Static_assert(cond, why)
#define DR_IOMMU_ALIGN _Alignas(128)
#endif

#define DR_TRANSLATION_MAGIC 0x6e61727474726964ull
#define DR_TRANSLATION_VERSION 1u

/* 16 MiB: 64 Ki generations a TiB, half a MiB; a larger leaf is invalidated and cached in pieces. */
#define DR_REGION_LG2 24

struct dr_translation_header {
    uint64_t magic;
    uint32_t version;      /* stored last, release */
    uint32_t format;       /* enum dr_format of ring/control.h */
    uint32_t aperture_lg2; /* IOVAs below 2^aperture_lg2 */
    uint32_t slice_lg2;    /* shard of an IOVA: iova >> slice_lg2 */
    uint32_t shards;
    uint32_t region_lg2; /* generation of an IOVA: iova >> region_lg2 */
    uint32_t root;       /* index of the root table */
    uint32_t root_level; /* levels below the root: 0 would be a root of leaves only */
    uint64_t top_tables; /* indices below this are top tables */
    uint64_t tables;     /* all table indices */
    /* offsets in the tables region, bytes */
    uint64_t table_bits;
    uint64_t line_words;
    uint64_t table_pages;
    uint64_t tables_size;
    /* offsets in this region, bytes */
    uint64_t shard_controls;
    uint64_t generations;
    uint64_t translation_size;
};

/* Ranges of IOVAs, closed intervals, that must not be pinned now. */
#define DR_CLOSED_MAX 7
struct dr_closed {
    DR_IOMMU_ALIGN uint64_t count; /* of ranges in use */
    struct {
        uint64_t start;
        uint64_t last;
    } range[DR_CLOSED_MAX];
};

enum dr_asleep {
    DR_AWAKE = 0,
    DR_ASLEEP = 1,      /* ring the doorbell after turning a table bit (S5) */
    DR_ASLEEP_PINS = 2, /* ring it also after giving back a pin (P3) */
};

struct dr_shard_control {
    DR_IOMMU_ALIGN uint64_t asleep; /* enum dr_asleep */
    /* The word of the device's context that says whether to set A and D, in the hardware's layout, its other bits zero.
     * Neither is set otherwise. Loaded at each walk, after the generation and before the first entry.
     *    AMD v1          device table entry, bits 63..0: HAD, bits 8:7, is 3
     *    VT-d            scalable-mode PASID table entry, bits 63..0: SSADE, bit 9
     *    SMMUv3 stage 2  stream table entry, bits 191..128: S2HD 55 and S2HA 56
     *    SMMUv3 stage 1  context descriptor, bits 63..0: HD 42 and HA 43 */
    DR_IOMMU_ALIGN uint64_t context;
    uint64_t first_table;
    uint64_t breaking; /* odd: leaves are being replaced; an entry that is not there is to be looked for again (S8) */
    uint64_t
        closing; /* a version: closed[closing & 1] holds. Load it, read the ranges (acquire), load it again: unchanged,
                  * they
                         belonged together; else again. The other one is only written before closing names it */
    struct dr_closed closed[2];
};

/* One thread's section counter and pins. Written by that thread only. */
struct dr_cell {
    DR_IOMMU_ALIGN uint64_t count; /* odd inside a section, even outside */
    uint64_t pinned;               /* slots held */
};

/* A pin slot. Those of thread i follow the cells: slots [i * pins, (i + 1) * pins). Written by that thread only. */
struct dr_pin {
    uint64_t count; /* odd: held */
    uint64_t start; /* IOVAs of the DMA in flight, */
    uint64_t last;  /*   closed interval */
    uint64_t write; /* 1: it writes guest memory */
};

DR_IOMMU_ASSERT(sizeof(struct dr_translation_header) == 112, "ABI");
DR_IOMMU_ASSERT(sizeof(struct dr_closed) == 128, "ABI");
DR_IOMMU_ASSERT(sizeof(struct dr_shard_control) == 512, "ABI");
DR_IOMMU_ASSERT(offsetof(struct dr_shard_control, context) == 128, "ABI");
DR_IOMMU_ASSERT(offsetof(struct dr_shard_control, closed) == 256, "ABI");
DR_IOMMU_ASSERT(sizeof(struct dr_cell) == 128, "ABI");
DR_IOMMU_ASSERT(sizeof(struct dr_pin) == 32, "ABI");

#ifdef __cplusplus
}
#endif

#endif
