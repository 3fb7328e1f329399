/* An unmap that ENABLE overtakes, in IOVA rings. IOVAs 0 and 1, each the slice of its own shard with its own ring,
 * lead to OAs 0 and 1. The VMM unmaps both at once: a part for each slice, one after the other. A part may wait for
 * a pin, so ENABLE comes in between anywhere. Then the VMM maps one of the IOVAs to OA 2, and syncs. It translates
 * runs of an IOVA by the old map until it has read the marker of the unmap's epoch in that ring (E-4), or, if the
 * answer has no epoch, until the answer.
 *
 * Whether the unmap marks is decided when its first part begins, noted before anything is taken out, and holds for
 * all its parts. Decided unmarked, a part that meets tracking ends the unmap with AGAIN. Devices are always on.
 * KILLS: how often the service dies. OF_FIRST: only IOVA 0 is written and mapped again.
 */
#define DEVICES 1
#define PAGES 3            /* OAs */
#ifndef WRITES
#define WRITES 2
#endif
#define NONE 9
#define CAPACITY 8         /* nobody waits for room */
#define RUN 1              /* entries of a ring */
#define SYNC 2
#define EPOCH 3            /*   and the number of the unmap */

#ifdef OF_FIRST
#define ANY_IOVA false
#else
#define ANY_IOVA true
#endif

#include "order.inc"
#include "kill.inc"
#include "ghost.inc"

mtype = { undecided, unmarked, marked };
mtype note = undecided;    /* of the unmap in flight: it outlives the service */

typedef Ring { byte entry[CAPACITY]; byte head, staged };
Ring ring[2];

byte cell, generation[2] = 1;
byte leaf[2];              /* IOVA -> OA */
bool dirty[2];
bool known[2] = true;      /* the owner's record has the map; it outlives the service */
bool tracking[2];          /* recorded, too */

byte unmaps;               /* submitted */
bool unmapping, answered;
byte from, at_part;        /* the first slice of the unmap in flight, and that of its part */
byte done;                 /* the answer: IOVAs below are unmapped, */
bool with_epoch;           /*   and their runs end at the marker */
bool enable_asked, enable_done;
byte remapped = NONE;      /* the IOVA that is mapped to OA 2 */
bool map_asked, map_done;
bool asked;

proctype Device()
{
    byte g, oa[2] = NONE, tag[2], iova, writes = WRITES, j;
    do
    :: writes == 0 -> break
    :: atomic { writes > 0 -> writes--; if :: iova = 0 :: ANY_IOVA -> iova = 1 fi; cell++ };    /* S3 */
       g = generation[iova];                                   /* S3 */
       if
       :: tag[iova] == g
       :: else ->
          d_step { oa[iova] = leaf[iova]; if :: oa[iova] != NONE -> dirty[iova] = true; tag[iova] = g :: else fi }
       fi;
       if
       :: tag[iova] == g -> atomic { assert(oa[iova] == 2 || !(done > iova)); at[0] = oa[iova]; behind[0] = true }
       :: else
       fi;
       atomic { cell++; complete(0); at[0] = 0; g = 0; iova = 0 }                   /* S1 */
    od
}

inline grace()
{
    sample = cell;
    sample % 2 == 0 || cell != sample;                         /* S1 */
    sample = 0
}

inline put(s, what)
{
    d_step { ring[s].entry[ring[s].staged] = what; ring[s].staged++ }               /* R2 */
}

inline publish(s)
{
    ring[s].head = ring[s].staged                              /* R3 */
}

inline pass(s)
{
    if
    :: dirty[s] && leaf[s] != NONE ->
       put(s, RUN);
       dirty[s] = false;
       generation[s]++;                                        /* S3 */
       grace();
       publish(s)
    :: else
    fi
}

inline enable(s)
{
    dirty[s] = false;
    tracking[s] = true;
    generation[s]++;                                           /* S3, S7 */
    grace()
}

inline answer(upto)
{
    d_step {
#ifdef EPOCH_PER_PART
        done = upto; with_epoch = any_marked; any_marked = false;
#else
        done = upto; with_epoch = (note == marked);
#endif
        unmapping = false; answered = true; note = undecided
    }
}

/* The part of slice s. */
inline take_out(s)
{
    if
    :: tracking[s] && dirty[s] -> put(s, RUN); d_step { dirty[s] = false; leaf[s] = NONE }
    :: else ->
       if
       :: d_step { !(tracking[s] && dirty[s]) -> dirty[s] = false; leaf[s] = NONE }        /* compare-and-swap */
       :: else -> put(s, RUN); d_step { dirty[s] = false; leaf[s] = NONE }
       fi
    fi;
#ifdef EPOCH_PER_PART
    if :: tracking[s] -> put(s, EPOCH + unmaps); any_marked = true :: else fi;
#else
    if :: note == marked -> put(s, EPOCH + unmaps) :: else fi;
#endif
    generation[s]++;                                           /* S3 */
    known[s] = false;
    grace();
    publish(s)
}

inline part(s)
{
#ifndef EPOCH_AT_SUBMISSION
    if :: note == undecided -> note = (tracking[s] -> marked : unmarked) :: else fi;
#endif
#if !defined(EPOCH_AT_SUBMISSION) && !defined(EPOCH_PER_PART)
    if
#ifdef AGAIN_THOUGH_GONE
    :: note == unmarked && tracking[s] -> answer(s)
#else
    :: known[s] && note == unmarked && tracking[s] -> answer(s)
#endif
    :: else ->
#endif
       if :: known[s] -> take_out(s) :: else fi;               /* else a restart does again what was done */
       if :: s == 0 -> at_part = 1 :: else -> answer(2) fi
#if !defined(EPOCH_AT_SUBMISSION) && !defined(EPOCH_PER_PART)
    fi
#endif
}

proctype Owner()
{
    byte sample, j;
    bool restarted, synced, any_marked;
again:
    {
        if
        :: restarted ->
           generation[0]++; generation[1]++;
           grace(); publish(0); publish(1);
#ifdef DECISION_NOT_NOTED
           note = undecided;
#endif
           at_part = from                                      /* the parts are done again */
        :: else
        fi;
end:    do
        :: tracking[0] && dirty[0] && leaf[0] != NONE -> pass(0)
        :: tracking[1] && dirty[1] && leaf[1] != NONE -> pass(1)
        :: enable_asked && !tracking[0] -> enable(0)
        :: enable_asked && !tracking[1] -> enable(1)
        :: enable_asked && tracking[0] && tracking[1] && !enable_done ->
           atomic {                                            /* the reply, and the VMM's first copy */
               enable_done = true; copy(0); copy(1); copy(2)
           }
        :: unmapping && at_part == 0 -> part(0)
        :: unmapping && at_part == 1 -> part(1)
        :: map_asked && !map_done ->
           d_step {
               if
               :: !known[remapped] -> dirty[remapped] = false; leaf[remapped] = 2; known[remapped] = true
               :: else
               fi
           };
           map_done = true
        :: asked && !synced ->
           grace();
           pass(0); put(0, SYNC); publish(0);
           pass(1); put(1, SYNC); publish(1);
           synced = true
        od
    } unless {
        atomic {
            killed -> killed = false; restarted = true;
            sample = 0; j = 0; synced = false; any_marked = false; at_part = from;
            goto again
        }
    }
}

/* C takes an entry of ring s, by the map it holds. */
inline take_entry(s)
{
    atomic {
        ring[s].head > 0 -> entry = ring[s].entry[0];
        for (i : 1 .. CAPACITY - 1) { ring[s].entry[i - 1] = ring[s].entry[i] }
        i = 0; ring[s].entry[CAPACITY - 1] = 0; ring[s].head--; ring[s].staged--;
        if
        :: entry == RUN && !fresh[s] -> copy(s)
        :: entry == RUN && fresh[s] && remapped == s -> copy(2)
        :: entry == RUN && fresh[s] && remapped != s           /* of nothing */
        :: entry == SYNC -> markers = markers | BIT(s); assert(markers != 3 || !(need[0] || need[1] || need[2]))
        :: entry > EPOCH -> passed[s] = entry - EPOCH; fresh[s] = fresh[s] || awaited[s] == passed[s]
        fi;
        entry = 0
    }
}

inline submit(first)
{
    d_step {
        from = first; at_part = first; unmaps++; unmapping = true;
#ifdef EPOCH_AT_SUBMISSION
        note = (enable_done -> marked : unmarked)
#endif
    }
}

proctype Vmm()
{
    byte entry, i, j, markers, passed[2], awaited[2];
    bool fresh[2];
end:
    do
    :: take_entry(0)
    :: take_entry(1)
    :: !unmaps -> submit(0)
    :: !enable_asked -> enable_asked = true
    :: atomic {
           answered -> answered = false;
           for (i : from .. done - 1) {
               if
               :: with_epoch && passed[i] != unmaps -> awaited[i] = unmaps
               :: else -> fresh[i] = true
               fi
           }
           i = 0;
           if
           :: done < 2 -> submit(done)
           :: else -> if :: remapped = 0 :: ANY_IOVA -> remapped = 1 fi; map_asked = true
           fi
       }
    :: d_step {
           map_done && enable_done && !asked -> asked = true;
           need[0] = owed[0]; need[1] = owed[1]; need[2] = owed[2]
       }
    od
}

init
{
    atomic { leaf[1] = 1; run Device(); run Owner(); run Vmm() }
}
