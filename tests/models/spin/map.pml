/* Map changes. IOVA 0 leads through a table page to OA 0. The VMM unmaps it (harvest: now, deferred or discard), then
 * maps IOVA 0 or 1 to OA 1, which takes the same table page again, then syncs. It has one thread: it reads its ring
 * between requests.
 *
 * SPACE_IOVA: runs name IOVAs, and the VMM keeps the old map until it has read the marker of the epoch.
 * KILLS: how often the service dies; a request not answered is done again from its intent.
 */
#define DEVICES 1
#define PAGES 2            /* OAs 0 and 1; IOVAs 0 and 1, each in a region of its own */
#ifndef WRITES
#define WRITES 3
#endif
#define NONE 9
#define EPOCH 101
#define CAPACITY 3
#define LEAVES 1
#define LEAF(p) 0
#define MAY_UNMAP
#define TRANSLATES(l) (leaf == walked)

byte root[2] = NONE;       /* IOVA -> table page; there is but one, page 0 */
byte leaf;                 /* its entry: an OA */

#include "order.inc"
#include "kill.inc"
#include "ghost.inc"
#include "ring.inc"
#include "section.inc"

mtype = { now, deferred, discard };
mtype harvest;
mtype = { idle, unmap_asked, unmap_again, unmap_done };
mtype request = idle;
bool map_asked, map_done;
byte map_iova;             /* what is mapped to OA 1: the VMM's own record */

proctype Device(byte d)
{
    byte g, iova, walked, tag[2], oa[2], writes = WRITES;
    bool mine, faulted;
    do
    :: writes == 0 -> break
    :: atomic { writes > 0 -> writes--; if :: iova = 0 :: map_iova == 1 -> iova = 1 fi; enter(d) };
       g = generation[iova];                                   /* S3 */
       if
       :: tag[iova] == g
       :: else ->
          walked = root[iova];                                 /* S6 */
          if
          :: walked == NONE -> faulted = true
          :: else ->
             walked = leaf;                                    /* S6 */
             if :: walked == NONE -> faulted = true :: else -> mark(d, 0) fi
          fi;
          if :: !faulted -> tag[iova] = g; oa[iova] = walked :: else fi
       fi;
       if
       :: faulted
       :: else ->
          atomic {
              assert(oa[iova] == 1 || request != unmap_done);                       /* OA 0 has been taken away */
              assert(oa[iova] == 0 || iova == map_iova);                            /* the wrong page */
              at[d] = oa[iova]; behind[d] = true
          }
       fi;
       atomic { leave(d); at[d] = 0; g = 0; iova = 0; walked = 0; mine = false; faulted = false }
    od
}

/* The entry of a run: what is mapped there, by the owner's record. */
#ifdef SPACE_IOVA
#define RUN(oa) (oa == 1 -> map_iova : 0)
#else
#define RUN(oa) oa
#endif
#define KEPT (staged + MARKER_SLOTS + 1)   /* a run leaves room for the markers of epoch and sync */

inline stage(oa)
{
    ring[staged] = RUN(oa);
    staged++                                                   /* R2 */
}

/* A pass over the one leaf. */
inline batch()
{
    if
    :: !dirty[0] || leaf == NONE -> pend = 0
    :: dirty[0] && leaf != NONE && KEPT < CAPACITY ->
       stage(leaf);
       dirty[0] = false;
       region = (root[1] == NONE -> 0 : 1);
       generation[region]++;                                   /* S3 */
       grace();
       publish();
       pend = 0
    :: else -> publish()   /* full: a consumer cannot make room of what it does not see */
    fi
}

/* Takes the entry out, D and all. Done again after a restart, it finds nothing. */
inline take_out()
{
#ifdef EXCHANGE_FIRST
    d_step { region = dirty[0]; dirty[0] = false; region = (region -> leaf : NONE); leaf = NONE };
    if :: region != NONE && harvest != discard -> stage(region) :: else fi
#else
    if
    :: dirty[0] && harvest != discard && leaf != NONE -> stage(leaf); d_step { dirty[0] = false; leaf = NONE }
    :: !dirty[0] || harvest == discard ->
#ifdef BLIND_STORE
       d_step { dirty[0] = false; leaf = NONE }
#else
       if
       :: d_step { !dirty[0] || harvest == discard -> dirty[0] = false; leaf = NONE }      /* compare-and-swap */
       :: else -> stage(leaf); d_step { dirty[0] = false; leaf = NONE }
       fi
#endif
    :: else
    fi
#endif
}

inline unmap()
{
    if
#ifdef WAITS_FOR_ROOM
    :: KEPT >= CAPACITY -> KEPT < CAPACITY
#else
    :: KEPT >= CAPACITY -> publish(); request = unmap_again    /* never waits for room */
#endif
    :: KEPT < CAPACITY ->
       take_out();
       root[0] = NONE;                                         /* the table is empty: unlink */
#ifdef SPACE_IOVA
       d_step { ring[staged] = EPOCH; staged++ };
#endif
       generation[0]++;                                        /* S3 */
#ifdef TABLE_WITHOUT_GRACE
       if :: map_asked -> map() :: else fi;
#endif
#ifndef UNMAP_WITHOUT_GRACE
       grace();
#endif
       if :: harvest == now -> publish() :: else fi;
       d_step {
           if :: harvest == discard -> owed[0] = false; behind[0] = behind[0] && at[0] == 1 :: else fi;
           request = unmap_done
       }
    fi
}

inline map()
{
    if
    :: root[map_iova] == NONE -> d_step { dirty[0] = false; leaf = 1 }; root[map_iova] = 0     /* S6 */
    :: else
    fi;
    map_done = true
}

proctype Owner()
{
    byte pend, taken, region, d, sample[DEVICES];
    bool restarted, answered;
again:
    {
        if
        :: restarted ->
           generation[0]++; generation[1]++;
           grace(); publish();
           pend = ALL_LINES
        :: else
        fi;
end:    do
        :: table || pend -> take(); if :: pend -> batch() :: else fi
#ifdef RESTART_FORGETS_INTENT
        :: request == unmap_asked && restarted && leaf == NONE -> request = unmap_done
#endif
        :: request == unmap_asked -> unmap()
        :: map_asked && request == unmap_done && !map_done -> map()
        :: asked && !answered ->
           grace(); take();
           do :: pend -> batch() :: else -> break od;
           put_marker(SYNC);
           answered = true
        od
    } unless {
        atomic {
            killed -> killed = false; restarted = true;
            pend = 0; taken = 0; region = 0; d = 0; sample[0] = 0; answered = false;
            goto again
        }
    }
}

/* C takes an entry, by the map it holds. */
inline take_entry()
{
    atomic {
        head > 0 -> release(entry);
        if
        :: entry == SYNC -> assert(!need[0] && !need[1]); asked = false
        :: entry == EPOCH -> remapped = true
        :: else ->
#ifdef SPACE_IOVA
           entry = (remapped && entry == map_iova -> 1 : 0);
#endif
           copy(entry)
        fi;
        entry = 0
    }
}

proctype Vmm()
{
    byte entry, i, j;
    bool remapped;
    do
    :: take_entry()
    :: atomic {
           if :: harvest = now :: harvest = deferred :: harvest = discard fi;
           if :: map_iova = 0 :: map_iova = 1 fi;
           if :: map_asked = true :: skip fi;                  /* behind the unmap, or after its reply */
           request = unmap_asked
       };
       break
    od;
    do
    :: request == unmap_again -> do :: take_entry() :: head == 0 -> break od; request = unmap_asked
    :: request == unmap_done -> break
    od;
#ifdef EPOCH_AT_REPLY
    remapped = true;
#endif
    map_asked = true;
    map_done;
    do
    :: take_entry()
    :: d_step { asked = true; need[0] = owed[0]; need[1] = owed[1] }; break
    od;
end:
    do
    :: take_entry()
    od
}

init
{
    atomic { root[0] = 0; run Device(0); run Owner(); run Vmm() }
}
