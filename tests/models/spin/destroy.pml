/* DESTROY of an hwpt with two shards: recorded, then each ring ended (END, publish, call), then the slot is freed.
 * KILLS: how often the worker dies. Its successor looks at each ring of an hwpt that was being destroyed: it
 * publishes what is staged, puts END unless the last entry is END, calls in any case, and then frees the slot.
 *
 * When nothing moves any more (timeout), each consumer has found END; where there was no room for it, all that there
 * was. A consumer that has found END reads no more, and nothing comes behind.
 */
#ifndef RUNS
#define RUNS 2             /* that each walker stages and publishes before the DESTROY */
#endif
#ifndef CAPACITY
#define CAPACITY 2
#endif
#define NONE 255
#define DISARMED 255

#include "order.inc"
#include "kill.inc"

typedef Ring { byte head, staged, tail, end, armed; bool call };        /* end: the index of END */
Ring ring[2];
bool found_end[2], no_room[2];
bool being_destroyed, freed;       /* in the record, which outlives the worker */

#define ENDED(r) ((found_end[r] || no_room[r]) && ring[r].tail == ring[r].staged)
#define FULL(r) (ring[r].staged - ring[r].tail == CAPACITY)

inline publish(r)
{
    before = ring[r].head;
    ring[r].head = ring[r].staged;                             /* R3, R4 */
    if
    :: ring[r].armed > before && ring[r].armed <= ring[r].staged -> ring[r].call = true    /* R4 */
    :: else
    fi;
    before = 0
}

inline put_end(r)
{
    d_step {
        if
        :: FULL(r) -> no_room[r] = true
        :: else -> assert(ring[r].end == NONE); ring[r].end = ring[r].staged; ring[r].staged++   /* R2 */
        fi
    }
}

inline end_ring(r)
{
    put_end(r);
#ifdef END_WITHOUT_CALL
    ring[r].head = ring[r].staged
#else
    publish(r)
#endif
}

/* The successor. */
inline end_left(r)
{
#ifdef DESTROY_NOT_ENDED
    skip
#else
    if :: ring[r].end == NONE -> put_end(r) :: else fi;
    ring[r].head = ring[r].staged;                             /* R3: all sections have ended */
#ifndef END_WITHOUT_CALL
    ring[r].call = true
#endif
#endif
}

proctype Worker()
{
    byte runs[2], before;
    bool restarted;
again:
    {
        if
        :: restarted && !being_destroyed ->                    /* a restart as in sleep.pml */
           ring[0].head = ring[0].staged; ring[0].call = true;
           ring[1].head = ring[1].staged; ring[1].call = true
        :: restarted && being_destroyed && !freed -> end_left(0); end_left(1); freed = true
        :: else
        fi;
        do
        :: !being_destroyed && runs[0] < RUNS && !FULL(0) -> d_step { runs[0]++; ring[0].staged++ }; publish(0)
        :: !being_destroyed && runs[1] < RUNS && !FULL(1) -> d_step { runs[1]++; ring[1].staged++ }; publish(1)
        :: !being_destroyed ->
           being_destroyed = true;
#ifdef SLOT_FREED_FIRST
           freed = true;
#endif
           end_ring(0);
           end_ring(1);
           freed = true
        od
    } unless {
        atomic { killed -> killed = false; restarted = true; before = 0; runs[0] = RUNS; runs[1] = RUNS; goto again }
    }
}

proctype Consumer(byte r)
{
    do
    :: ring[r].head != ring[r].tail ->
       atomic {
           if :: ring[r].tail == ring[r].end -> found_end[r] = true :: else fi;
           ring[r].tail++                                      /* R1 */
       };
       if :: found_end[r] -> break :: else fi
    :: ring[r].head == ring[r].tail ->
       ring[r].armed = ring[r].tail + 1;                       /* R4 */
       if
       :: ring[r].head != ring[r].tail                         /* R4: look again */
       :: else -> atomic { ring[r].call -> ring[r].call = false }
       fi;
       ring[r].armed = DISARMED
    od
}

/* Nothing moves any more. */
proctype Quiet()
{
    bool on;
    timeout -> assert(freed && ENDED(0) && ENDED(1));
    do :: on = !on od      /* so that no state is an end state */
}

init
{
    byte i;
    atomic {
        for (i : 0 .. 1) { ring[i].end = NONE; ring[i].armed = DISARMED }
        i = 0;
        run Worker(); run Consumer(0); run Consumer(1); run Quiet()
    }
}
