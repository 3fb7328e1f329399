/* Pins (P1 to P4): DMA in flight without a section. Device 0 pins a page, its I/O lands, it gives the page back; device
 * 1 writes in sections. The owner sweeps, unmaps page 0, and syncs; when it only waits, it sleeps. What is published is
 * copied at once.
 *
 * A sync promises, beside what was completed before, that the pins held at the request are over and their data copied.
 * SLOW_DISK: I/O lands after page 1 has been copied. DEATHS: device 0 may die at any step. KILLS: how often the service
 * dies.
 */
#define DEVICES 2
#define PAGES 2
#ifndef PINS
#define PINS 2             /* of device 0 */
#endif
#ifndef DEATHS
#define DEATHS 0
#endif
#ifndef WRITES
#define WRITES 1           /* of device 1 */
#endif
#ifndef UNMAPS
#define UNMAPS 1
#endif
#define WALKER DEVICES
#define MAY_UNMAP
#define AWAKE 0
#define ASLEEP 1
#define ASLEEP_PINS 2

#include "order.inc"
#include "kill.inc"
#include "ghost.inc"
#include "section.inc"

byte slot;                 /* of device 0: odd, it holds a pin */
byte range = 1;            /*   of this page */
byte pinned;               /* of its cell: slots held */
bool closing;              /* page 0 must not be pinned now */
byte asleep;
bool bell;
byte staged;               /* runs, a bit for each page; a crash publishes them */
bool unmap_asked, unmap_done, sync_asked, sync_done;
bool held, promised;       /* ghosts: the pin is granted; the sync promises that it will be over */

#define CLOSED (closing && at[0] == 0)

#include "pins-device.inc"

inline publish()
{
    d_step {
        for (l : 0 .. PAGES - 1) { if :: staged & BIT(l) -> copy(l) :: else fi }
        l = 0; staged = 0
    }
}

inline batch()
{
    do
    :: l < PAGES -> d_step { if :: dirty[l] -> batched = batched | BIT(l) :: else fi; l++ }        /* S4 */
    :: else -> break
    od;
    atomic { l = 0; pend = 0 };
    if
    :: batched ->
       staged = staged | batched;
       d_step { for (l : 0 .. PAGES - 1) { if :: batched & BIT(l) -> dirty[l] = false :: else fi } };
       d_step { for (l : 0 .. PAGES - 1) { if :: batched & BIT(l) -> generation[l]++ :: else fi } l = 0; batched = 0 };
       grace();
       publish()
    :: else
    fi
}

/* The slot, if it is held by a pin that `matches`, else 0. */
inline sample_slot(x, matches)
{
    if
    :: pinned == 0 -> x = 0                                    /* P1 */
    :: else ->
       x = slot;                                               /* P1 */
       if
#ifdef RANGE_LOOKED_AT_ONCE
       :: x % 2 && matches
#else
       :: x % 2 && matches && slot == x                        /* P4 */
#endif
       :: else -> x = 0
       fi
    fi
}

#define PIN_PASSED(x) (x == 0 || slot != x || gone[0])         /* P2 */
#define UNMAP_CAN_GO (closing && unmap_waits && PIN_PASSED(unmap_slot))
#define SYNC_CAN_GO (sync_waits && PIN_PASSED(sync_slot))
#define LEFT_TO_BURY (dead[0] && !gone[0])

inline unmap()
{
    if :: dirty[0] -> staged = staged | BIT(0) :: else fi;     /* R2: from here a crash publishes it */
    if
    :: d_step { !dirty[0] || (staged & BIT(0)) -> dirty[0] = false; mapped[0] = false }    /* compare-and-swap,
                                                                                            * exchange */
    :: else -> staged = staged | BIT(0); d_step { dirty[0] = false; mapped[0] = false }
    fi;
#ifdef OPEN_BEFORE_ADVANCE
    closing = false;
#endif
    generation[0]++;                                           /* S3 */
    sample_cells();
    closing = false;
    wait_cells();
    publish();
    unmap_waits = false; unmap_slot = 0;
    d_step { unmap_asked = false; unmap_done = true }
}

inline sync_pass()
{
#if defined(GRACE_FIRST)
    if :: sync_slot -> grace() :: else fi;
#elif defined(NO_GRACE_AFTER_PINS)
    if :: !sync_slot -> grace() :: else fi;
#else
    grace();
#endif
    sync_waits = false; sync_slot = 0;
    take();
    if :: pend -> batch() :: else fi;
    publish();
    d_step { assert(!promised && !need[0] && !need[1]); sync_asked = false; sync_done = true }
}

inline wait_awake()
{
    atomic { bell || LEFT_TO_BURY || (unmap_asked && !unmap_waits) || (sync_asked && !sync_waits) -> bell = false }
}

proctype Owner()
{
    byte pend, taken, batched, l, d, j, sample[DEVICES], unmap_slot, sync_slot;
    bool unmap_waits, sync_waits, restarted;
again:
    {
        if
        :: restarted ->
           d_step { generation[0]++; generation[1]++ };
           grace(); publish(); pend = ALL_LINES
        :: else
        fi;
        do
        :: LEFT_TO_BURY -> bury(0)
        :: table || pend -> take(); if :: pend -> batch() :: else fi
        :: unmap_asked && !unmap_waits ->
#ifdef CLOSING_RELEASE
           PUT_OFF(WALKER);
#else
           closing = true;                                     /* P1 */
#endif
#ifndef UNMAP_IGNORES_PINS
           sample_slot(unmap_slot, range == 0);
#endif
#ifdef CLOSING_RELEASE
           DRAINED(WALKER);
#endif
           unmap_waits = true
        :: UNMAP_CAN_GO && !LEFT_TO_BURY -> unmap()
        :: sync_asked && !sync_waits ->
#ifdef GRACE_FIRST
           grace();
#endif
#ifndef SYNC_IGNORES_PINS
           sample_slot(sync_slot, true);
#endif
           sync_waits = true
        :: SYNC_CAN_GO && !LEFT_TO_BURY -> sync_pass()
        :: else ->
#ifdef ASLEEP_RELEASE
           PUT_OFF(WALKER);
#else
           asleep = (unmap_waits || sync_waits -> ASLEEP_PINS : ASLEEP);           /* P3, S5 */
#endif
           if
           :: table                                            /* S5: look again */
#ifndef NO_LOOK_AT_PINS
           :: UNMAP_CAN_GO || SYNC_CAN_GO                      /* P3: look again */
           :: else -> wait_awake()
#else
           :: !table -> wait_awake()
#endif
           fi;
#ifdef ASLEEP_RELEASE
           DRAINED(WALKER);
#endif
           asleep = AWAKE
        od
    } unless {
        atomic {
            killed -> killed = false; restarted = true;
            pend = 0; taken = 0; batched = 0; l = 0; d = 0;
            unmap_slot = 0; sync_slot = 0; unmap_waits = false; sync_waits = false; sample[0] = 0; sample[1] = 0;
#ifdef RESTART_FORGETS_PINS
            gone[0] = dead[0];
#else
            gone[0] = false;
#endif
            goto again
        }
    }
}

proctype Vmm()
{
    do
    :: d_step { UNMAPS && !unmap_asked && !unmap_done -> unmap_asked = true }
    :: d_step {
           !sync_asked && !sync_done ->
           sync_asked = true; need[0] = owed[0]; need[1] = owed[1];
           promised = held
       }
    od
}

/* Nothing moves any more: nobody waits. */
proctype Quiet()
{
    bool on;
    timeout -> assert((unmap_done || !UNMAPS) && sync_done && !table);
    do :: on = !on od      /* so that no state is an end state */
}

init
{
    byte i;
    atomic {
        run Pinner(); if :: WRITES -> run Writer() :: else fi; run Owner(); run Vmm(); run Quiet();
#ifdef LATE
        for (i : 0 .. DEVICES) { run Drain(i) }
#endif
    }
}
