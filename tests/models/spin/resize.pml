/* Split and collapse. Pages 0 and 1 are mapped large or small; the owner changes that once, and sweeps before and after.
 *
 * KIND: SPLIT_REPLICAS   AMD: a large leaf is written twice, in entries 0 and 1, and hardware may set D in either
 *       SPLIT_TABLE      a large leaf (entry 2) becomes a table of entries 0 and 1
 *       COLLAPSE_DIRTY   a table becomes a large leaf, installed with D
 *       COLLAPSE_READ    the same, but D as the children had it, and they are read again after the grace
 * KILLS: how often the service dies; an intent survives, and a restart acts on it.
 */
#define SPLIT_REPLICAS 1
#define SPLIT_TABLE 2
#define COLLAPSE_DIRTY 3
#define COLLAPSE_READ 4
#define REPLICATED (KIND == SPLIT_REPLICAS)
#define COLLAPSES (KIND >= COLLAPSE_DIRTY)

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
#define TRANSLATES(l) (kind[l] == walked_kind)     /* the entries of a table that was unlinked stay as they are */

#include "order.inc"
#include "kill.inc"
#include "ghost.inc"
#include "section.inc"

bool intent;               /* in the private memfd, before the first store of the change */
byte staged;               /* pages */
bool asked, changed;

proctype Device(byte d)
{
    byte g, tag, entry, page, writes = WRITES;
    bool mine, faulted, walked_kind, wide;
    do
    :: writes == 0 -> break
    :: atomic { writes > 0 -> writes--; if :: at[d] = 0 :: at[d] = 1 fi; enter(d) };
       g = generation[0];                                      /* S3 */
       if
       :: tag == g && (wide || page == at[d])                  /* D was set by us */
       :: else ->
          do
          :: faulted = false;
             if
             :: REPLICATED -> atomic { entry = at[d]; walked_kind = kind[entry]; wide = walked_kind }
             :: else -> atomic { wide = kind[2]; walked_kind = wide; entry = (wide -> 2 : at[d]) }
             fi;
             mark(d, entry);                                   /* in a replica: that of the page that was walked for */
             if :: faulted :: else -> break fi                 /* it has changed: walk again */
          od;
          atomic { tag = g; page = at[d] }
       fi;
       write_data(d);
       atomic { leave(d); at[d] = 0; g = 0; mine = false; entry = 0; walked_kind = 0 }
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
       staged = staged | ((batched & 4) || kind[0] -> 3 : batched);    /* one dirty replica reports the whole leaf */
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

inline change()
{
    intent = true;
    if
    :: REPLICATED ->
       d_step { batched = dirty[0]; kind[0] = SMALL };         /* compare-and-swap: entry 0's D is carried */
       d_step { batched = batched || dirty[1]; kind[1] = SMALL };
#ifndef NAIVE_REPLICATED_SPLIT
       if :: batched -> spread() :: else fi;
#endif
       batched = 0
    :: KIND == SPLIT_TABLE ->
#ifdef SPLIT_BLIND
       batched = dirty[2];
       d_step { dirty[0] = batched; dirty[1] = batched; dirty[2] = false; kind[2] = SMALL };
#else                                                          /* compare-and-swap */
       d_step { batched = dirty[2]; dirty[0] = batched; dirty[1] = batched; dirty[2] = false; kind[2] = SMALL };
#endif
       if :: batched -> pend = ALL_LINES :: else fi;
       batched = 0
    :: KIND == COLLAPSE_DIRTY ->
       d_step { dirty[2] = true; kind[2] = LARGE_LEAF }; pend = ALL_LINES
    :: KIND == COLLAPSE_READ ->
       batched = dirty[0]; batched = batched || dirty[1];
       d_step { dirty[2] = batched; kind[2] = LARGE_LEAF };
       batched = 0
    fi;
    generation[0]++;                                           /* S3 */
    grace();
    if
    :: COLLAPSES ->
#ifndef NAIVE_COLLAPSE
       if :: KIND == COLLAPSE_READ && (dirty[0] || dirty[1]) -> dirty[2] = true :: else fi;
#endif
       pend = ALL_LINES;
       d_step { dirty[0] = false; dirty[1] = false }           /* the table is used again */
    :: else
    fi;
    intent = false; changed = true
}

/* The change was begun: finish it without knowing what had D. */
inline finish_change()
{
    if
    :: REPLICATED -> kind[0] = SMALL; kind[1] = SMALL; spread()
    :: COLLAPSES && kind[2] -> dirty[2] = true
    :: else
    fi;
    intent = false
}

proctype Owner()
{
    byte pend, taken, batched, l, d, j, sample[DEVICES];
    bool restarted;
again:
    {
        if
        :: restarted ->
#ifndef RESTART_FORGETS_INTENT
           if :: intent -> finish_change() :: else fi;
#endif
           generation[0]++;
           grace(); publish(); pend = ALL_LINES; changed = true
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
        for (i : 0 .. DEVICES - 1) { run Device(i) }
        run Owner()
    };
    d_step { asked = true; need[0] = owed[0]; need[1] = owed[1] }
}
