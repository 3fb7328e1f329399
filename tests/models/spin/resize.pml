/* Split and collapse. Pages 0 and 1 are mapped large or small; the owner changes that once, and sweeps before and
 * after.
 *
 * KIND: SPLIT_REPLICAS   AMD: a large leaf is written twice, in entries 0 and 1, and hardware may set D in either
 *       SPLIT_TABLE      a large leaf (entry 2) becomes a table of entries 0 and 1
 *       COLLAPSE         a table becomes a large leaf, installed clean; the table's leaves are read after the grace
 * KILLS: how often the service dies. What survives is the record: which size the leaves have. In doubt it has the large
 * one, but for a collapse, where it has the table until its leaves were read; then the restart puts the table back.
 * BREAK: hardware must not find two sizes within one grace period. Entry 2 is missing until the grace after its advance
 * is over; meanwhile `breaking` is odd: who finds nothing leaves its section and waits (S8). A restart breaks a
 * half-replaced leaf again.
 */
#define SPLIT_REPLICAS 1
#define SPLIT_TABLE 2
#define COLLAPSE 3
#define REPLICATED (KIND == SPLIT_REPLICAS)

#define PAGES 2
#define LEAVES 3
#define LEAF(p) p
#ifndef DEVICES
#define DEVICES 1
#endif
#ifndef WRITES
#define WRITES 2           /* of each device */
#endif
#define SMALL 0
#define LARGE_LEAF 1

bool kind[3];              /* of entries 0 and 1 (replicas): SMALL or LARGE_LEAF. Of entry 2: a table, or LARGE_LEAF */
#define MAY_UNMAP
bool broken;               /* entry 2 is missing, and `breaking` odd */
#define TRANSLATES(l) (kind[l] == walked_kind && !(l == 2 && broken))    /* the entries of an unlinked table stay */

#include "order.inc"
#include "kill.inc"
#include "ghost.inc"
#include "section.inc"

bool recorded_large;       /* of the replicas, in the private memfd */
bool noted;                /* the table, in the private memfd */
byte staged;               /* pages */
bool asked, changed;

#if defined(BREAK) && DEVICES == 2
#define MAY_WRITE(p) (p == d)      /* pages are alike */
#else
#define MAY_WRITE(p) true
#endif
#ifdef BREAK
#define UNUSED 2
byte used[DEVICES] = UNUSED;       /* ghosts: the size that each section goes by, */
byte cached[DEVICES] = UNUSED;     /* and that each IOTLB has, */
byte cached_at[DEVICES];           /* of this generation */
#define OTHER (DEVICES - 1 - d)
#define ONE_SIZE(size) (DEVICES == 1 || \
    ((used[OTHER] == UNUSED || used[OTHER] == size) && \
     (cached_at[OTHER] != generation[0] || cached[OTHER] == size)))
#endif

proctype Device(byte d)
{
    byte g, tag, entry, page, writes = WRITES;
    bool mine, faulted, walked_kind, wide;
    do
    :: writes == 0 -> break
    :: atomic { writes > 0 -> writes--; if :: MAY_WRITE(0) -> at[d] = 0 :: MAY_WRITE(1) -> at[d] = 1 fi; enter(d) };
       g = generation[0];                                      /* S3 */
       if
       :: tag == g && (wide || page == at[d])                  /* D was set by us */
#ifdef BREAK
          -> used[d] = wide
#endif
       :: else ->
          do
          :: faulted = false;
             if
             :: REPLICATED -> atomic { entry = at[d]; walked_kind = kind[entry]; wide = walked_kind }
#ifdef BREAK
             :: broken -> atomic { leave(d); used[d] = UNUSED }; !broken; enter(d); g = generation[0]; faulted = true
             :: atomic {
                    !broken -> wide = kind[2]; walked_kind = wide; entry = (wide -> 2 : at[d]);
                    assert(ONE_SIZE(wide)); used[d] = wide
                }
#else
             :: else -> atomic { wide = kind[2]; walked_kind = wide; entry = (wide -> 2 : at[d]) }
#endif
             fi;
             if
             :: !faulted -> mark(d, entry)                     /* in a replica: that of the page that was walked for */
             :: else
             fi;
             if :: faulted :: else -> break fi                 /* it has changed: walk again */
          od;
#ifdef BREAK
          atomic { tag = g; page = at[d]; cached[d] = wide; cached_at[d] = g }
#else
          atomic { tag = g; page = at[d] }
#endif
       fi;
       write_data(d);
       atomic {
           leave(d); at[d] = 0; g = 0; mine = false; entry = 0; walked_kind = 0
#ifdef BREAK
           ; used[d] = UNUSED
#endif
       }
    od
}

inline publish()
{
    d_step {
        for (l : 0 .. PAGES - 1) { if :: staged & BIT(l) -> copy(l) :: else fi }
        l = 0; staged = 0
    }
}

/* Reads what is mapped, all replicas of a leaf; stages; clears. */
inline pass()
{
    if
    :: !REPLICATED && kind[2] -> if :: dirty[2] -> batched = 4 :: else fi
    :: else ->
       if :: dirty[0] -> batched = 1 :: else fi;
       if :: dirty[1] -> batched = batched | 2 :: else fi
    fi;
    atomic { pend = 0 };
    if
    :: batched ->
#ifdef REPLICA_ALONE
       staged = staged | ((batched & 4) -> 3 : batched);
#else
       staged = staged | ((batched & 4) || recorded_large -> 3 : batched);    /* one dirty replica reports the whole
                                                                               * leaf */
#endif
       do
       :: l < 3 -> d_step { if :: batched & BIT(l) -> dirty[l] = false :: else fi; l++ }
       :: else -> break
       od;
       atomic { l = 0; batched = 0 };
       generation[0]++;                                        /* S3 */
       grace();
       publish()
    :: else
    fi
}

/* D in all children. No compare-and-swap: it only adds. */
inline spread()
{
    dirty[0] = true; dirty[1] = true; pend = ALL_LINES
}

#ifdef BREAK
#define GONE broken = true
#else
#define GONE kind[2] = SMALL
#endif
/* The table in the place of the leaf: D in its leaves if the large one has it, then compare-and-swap; if that fails, D
 * in all of them. */
inline put_table()
{
    batched = dirty[2];
    if :: batched -> spread() :: else fi;
    if
    :: atomic { dirty[2] == batched -> dirty[2] = false; GONE }
    :: else -> spread(); d_step { dirty[2] = false; GONE }
    fi;
    batched = 0
}

/* The grace has passed: the table is linked. */
inline link_table()
{
    d_step { if :: broken -> kind[2] = SMALL; broken = false :: else fi }
}

inline change()
{
    if
    :: REPLICATED ->
#ifdef RECORD_FIRST
       recorded_large = false;
#endif
       d_step { batched = dirty[0]; kind[0] = SMALL };         /* compare-and-swap: each replica's D is carried */
       d_step { batched = batched || dirty[1]; kind[1] = SMALL };
#ifndef NAIVE_REPLICATED_SPLIT
       if :: batched -> spread() :: else fi;
#endif
       batched = 0;
       recorded_large = false
    :: KIND == SPLIT_TABLE ->
#ifdef SPLIT_BLIND
       batched = dirty[2];
       d_step { dirty[0] = batched; dirty[1] = batched; dirty[2] = false; kind[2] = SMALL };
       batched = 0
#else
       d_step { dirty[0] = false; dirty[1] = false };
       noted = true;
       put_table()
#endif
    :: KIND == COLLAPSE ->
#ifdef NAIVE_COLLAPSE
       batched = dirty[0]; batched = batched || dirty[1];
#endif
#ifdef BREAK
       broken = true;
#else
       d_step { dirty[2] = batched; kind[2] = LARGE_LEAF };
#endif
       batched = 0
    fi;
    generation[0]++;                                           /* S3 */
    grace();
    if
    :: KIND == COLLAPSE ->
#ifdef BREAK
       batched = dirty[0] || dirty[1];
       d_step { dirty[2] = false; kind[2] = LARGE_LEAF; broken = false };
       if :: batched -> dirty[2] = true; pend = ALL_LINES :: else fi;
       batched = 0;
#elif !defined(NAIVE_COLLAPSE)
       if :: dirty[0] || dirty[1] -> dirty[2] = true; pend = ALL_LINES :: else fi;
#endif
       noted = false;
       d_step { dirty[0] = false; dirty[1] = false }           /* the table is used again */
    :: else -> link_table()
    fi;
    changed = true
}

proctype Owner()
{
    byte pend, taken, batched, l, d, j, sample[DEVICES];
    bool restarted;
again:
    {
        if
        :: restarted ->
#ifndef RESTART_FORGETS
#ifdef RELINKED_AT_ONCE
           if :: noted && kind[2] -> put_table() :: else fi;
           link_table();
#elif defined(BREAK)
           if :: noted && kind[2] && !broken -> put_table() :: else fi;
#else
           if :: noted && kind[2] -> put_table() :: else fi;
#endif
#else
           recorded_large = false;
#endif
           generation[0]++;
           grace(); link_table(); publish(); pend = ALL_LINES;
           changed = !recorded_large                           /* the command is done again, or the collapse is given
                                                                * up */
        :: else
        fi;
end:    do
        :: table || pend -> take(); pass()
        :: !changed -> change()
        :: asked ->
           grace(); take();
           if :: pend -> pass() :: else fi;
           d_step { assert(!need[0] && !need[1]); asked = false }
        od
    } unless {
        atomic {
            killed -> killed = false; restarted = true;
            pend = 0; taken = 0; batched = 0; l = 0; d = 0; sample[0] = 0; sample[DEVICES - 1] = 0;
            goto again
        }
    }
}

init
{
    byte i;
    atomic {
        kind[0] = REPLICATED; kind[1] = REPLICATED; kind[2] = (KIND == SPLIT_TABLE);
        recorded_large = REPLICATED; noted = (KIND == COLLAPSE);
        for (i : 0 .. DEVICES - 1) { run Device(i) }
        run Owner()
    };
    d_step { asked = true; need[0] = owed[0]; need[1] = owed[1] }
}
