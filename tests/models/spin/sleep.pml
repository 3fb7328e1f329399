/* Sleeping and waking: the consumer by its event index (R4), the walker before a full ring or a slow consumer by
 * want_kick (R5), the idle walker by asleep (S5). All alike: raise the flag, look again, sleep; the other side stores,
 * then reads the flag.
 *
 * One page. What is dirty must come through: when nothing moves any more (timeout), nothing may be left on the way.
 * PACED: the walker waits until its consumer has taken everything, not only for room. KILLS: how often the service
 * dies.
 */
#ifndef DEVICES
#define DEVICES 2
#endif
#ifndef WRITES
#define WRITES 2           /* of each device */
#endif
#ifndef CAPACITY
#define CAPACITY 1
#endif
#define WALKER DEVICES
#define CONSUMER (DEVICES + 1)
#define DISARMED 255

#include "order.inc"
#include "kill.inc"

bool dirty, table, asleep, want_kick;
byte head, staged, tail;
byte armed = DISARMED;
bool doorbell, call;       /* eventfds */

#ifdef TABLE_RELEASE
bool unseen;               /* the walker does not see the table bit yet */
#define SEEN_TABLE (table && !unseen)
#else
#define SEEN_TABLE table
#endif

#ifdef PACED
#define MAY_SWEEP (tail == head)
#else
#define MAY_SWEEP (staged - tail < CAPACITY)
#endif

proctype Device(byte d)
{
    byte writes = WRITES;
    bool mine, turned;
    do
    :: writes > 0 ->
       writes--;
       d_step { mine = !dirty; dirty = true };
       if
       :: mine && !table ->
          d_step {
              turned = !table; table = true;                   /* S5 */
#ifdef TABLE_RELEASE
              unseen = true; PUT_OFF(d)
#endif
          };
#ifndef NO_DOORBELL
          if :: turned && asleep -> doorbell = true :: else fi;    /* S5 */
#endif
#ifdef TABLE_RELEASE
          DRAINED(d);
#endif
       :: else
       fi;
       atomic { mine = false; turned = false }
    :: else -> break
    od
}

inline publish()
{
    before = head;
#ifdef HEAD_RELEASE
    PUT_OFF(WALKER);
#else
    head = staged;                                             /* R3, R4 */
#endif
#ifdef CALL_WITHOUT_LOOK
    skip;
#else
    if
    :: armed != DISARMED && armed > before && armed <= staged -> call = true    /* R4 */
    :: else
    fi;
#endif
#ifdef HEAD_RELEASE
    DRAINED(WALKER);
#endif
    before = 0
}

inline sleep()
{
    atomic { doorbell -> doorbell = false }
}

proctype Walker()
{
    bool pend;             /* taken and not finished; after a restart, the full scan that is owed */
    byte before;
again:
    {
        do
        :: MAY_SWEEP && (table || pend) ->
           d_step { pend = pend || SEEN_TABLE; if :: SEEN_TABLE -> table = false :: else fi };
           if
           :: pend && dirty && staged - tail < CAPACITY ->
              staged++;                                        /* R2 */
              dirty = false;
              pend = false;
              publish()
           :: pend && !dirty -> pend = false
           :: else
           fi
        :: !MAY_SWEEP ->
#ifdef WANT_KICK_RELEASE
           PUT_OFF(WALKER);
#elif !defined(NO_WANT_KICK)
           want_kick = true;                                   /* R5 */
#endif
#ifndef NO_LOOK_AT_ROOM
           if :: MAY_SWEEP :: else -> sleep() fi;              /* R5: look again */
#else
           sleep();
#endif
#ifdef WANT_KICK_RELEASE
           DRAINED(WALKER);
#endif
           want_kick = false
        :: MAY_SWEEP && !table && !pend ->
#ifdef ASLEEP_RELEASE
           PUT_OFF(WALKER);
#else
           asleep = true;                                      /* S5 */
#endif
#ifndef NO_LOOK_AT_TABLE
           if :: SEEN_TABLE :: else -> sleep() fi;             /* S5: look again */
#else
           sleep();
#endif
#ifdef ASLEEP_RELEASE
           DRAINED(WALKER);
#endif
           asleep = false
        od
    } unless {
        killed;
        before = 0;
        killed = false;    /* and the new one begins: what was staged, the call, the full scan */
        head = staged;
#ifndef NO_CALL_AFTER_RESTART
        call = true;
#endif
        pend = true;
        goto again
    }
}

proctype Consumer()
{
    do
    :: head != tail ->
#ifdef TAIL_RELEASE
       PUT_OFF(CONSUMER);
#else
       tail++;                                                 /* R1, R5 */
#endif
       if :: want_kick -> doorbell = true :: else fi;          /* R5 */
#ifdef TAIL_RELEASE
       DRAINED(CONSUMER)
#endif
    :: head == tail ->
#ifdef ARMED_RELEASE
       PUT_OFF(CONSUMER);
#else
       armed = tail + 1;                                       /* R4 */
#endif
#ifndef NO_LOOK_AT_HEAD
       if :: head != tail :: else -> atomic { call -> call = false } fi;        /* R4: look again */
#else
       atomic { call -> call = false };
#endif
#ifdef ARMED_RELEASE
       DRAINED(CONSUMER);
#endif
       armed = DISARMED
    od
}

#ifdef LATE
proctype Drain(byte i)
{
    do
    :: d_step {
           IS_LATE(i) ->
#if defined(TABLE_RELEASE)
           unseen = false;
#elif defined(HEAD_RELEASE)
           head = staged;
#elif defined(WANT_KICK_RELEASE)
           want_kick = true;
#elif defined(ASLEEP_RELEASE)
           asleep = true;
#elif defined(TAIL_RELEASE)
           tail++;
#elif defined(ARMED_RELEASE)
           armed = tail + 1;
#endif
           late = late & ~BIT(i)
       }
    od
}
#endif

/* Nothing moves any more: all is delivered. */
proctype Quiet()
{
    bool on;
    timeout -> assert(!dirty && head == staged && head == tail);
    do :: on = !on od      /* so that no state is an end state */
}

init
{
    byte i;
    atomic {
        for (i : 0 .. DEVICES - 1) { run Device(i) }
        run Walker(); run Consumer(); run Quiet();
#ifdef LATE
        for (i : 0 .. CONSUMER) { run Drain(i) }
#endif
    }
}
