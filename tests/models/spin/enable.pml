/* Enabling (S7): clean, arm, advance, grace, reply. Before it devices write freely and leave D alone; D may be left
 * from an earlier time. When the VMM has the reply it copies everything once; from there on the ring must tell it.
 *
 * ALWAYS_ON: devices mark all the time. Pages are cleaned one after the other: a page that was marked behind that
 * has its summary, unless its device died before it came to it. DEATHS: device 0 may die, at any step. KILLS: how
 * often the service does.
 */
#ifndef DEVICES
#define DEVICES 1
#endif
#ifndef PAGES
#define PAGES 1
#endif
#define LINES PAGES
#ifndef WRITES
#define WRITES 3           /* of the last device; each other one makes one */
#endif
#ifndef DEATHS
#define DEATHS 0
#endif

bool tracking, replied;
bool asked;

#include "order.inc"
#include "kill.inc"
#include "ghost.inc"
#include "section.inc"

#define DIED(x) (dead[x] && !gone[x])
byte staged;               /* runs, a bit for each page; a crash publishes them */

proctype Device(byte d)
{
    byte g, tag[PAGES], writes = (d == DEVICES - 1 -> WRITES : 1);
    bool mine, tracked;
    {
        do
        :: writes == 0 -> break
        :: atomic { writes > 0 -> writes--; if :: at[d] = 0 :: d == DEVICES - 1 -> at[d] = PAGES - 1 fi; enter(d) };
#ifdef TRACKING_BEFORE_GENERATION
           tracked = tracking;
#endif
           g = generation[at[d]];                              /* S3, S7 */
           if
           :: tag[at[d]] == g
           :: else ->
#ifdef ALWAYS_ON
              mark(d, at[d]);
#else
#ifndef TRACKING_BEFORE_GENERATION
              tracked = tracking;                              /* S7 */
#endif
              if :: tracked -> mark(d, at[d]) :: else fi;
#endif
              tag[at[d]] = g
           fi;
           write_data(d);
           atomic { leave(d); at[d] = 0; g = 0; mine = false; tracked = false }
        od
    } unless {
        atomic { dead[d] -> g = 0; tag[0] = 0; tag[PAGES - 1] = 0; mine = false; tracked = false; writes = 0 }
    }
}

inline publish()
{
    d_step {
        for (l : 0 .. PAGES - 1) { if :: staged & BIT(l) -> copy(l) :: else fi }
        l = 0; staged = 0
    }
}

inline advance_all()
{
    do
    :: l < PAGES -> generation[l]++; l++                       /* S3 */
    :: else -> l = 0; break
    od
}

/* Takes each line and cleans what is in it. A death begins it anew: `pend` is full again. */
inline clean()
{
    d_step { pend = ALL_LINES; table = false };
    do
    :: pend && !(pend & BIT(l)) -> l++
    :: pend & BIT(l) -> d_step { pend = pend & ~BIT(l); lines = lines & ~BIT(l) }; dirty[l] = false; l = 0
    :: DIED(0) -> bury(0); l = 0
    :: !pend -> break
    od;
    l = 0
}

inline enable()
{
#if defined(ADVANCE_BEFORE_ARM)
    clean(); advance_all(); tracking = true;
#elif defined(ARM_BEFORE_CLEAN)
    tracking = true; advance_all(); clean();
#else
#ifndef ENABLE_WITHOUT_CLEAN
    if :: !tracking -> clean() :: else fi;                     /* a restart: armed, so what is dirty is to be told */
#endif
    tracking = true;                                           /* S7 */
#ifndef ENABLE_WITHOUT_ADVANCE
    advance_all();
#endif
#endif
#ifndef ENABLE_WITHOUT_GRACE
    grace();
#endif
    atomic {                                                   /* the reply, and the VMM's first copy */
        replied = true;
        for (l : 0 .. PAGES - 1) { copy(l) }
        l = 0
    }
}

inline pass()
{
    take();
    do
    :: l < PAGES ->
       d_step { if :: (pend & BIT(l)) && dirty[l] -> batched = batched | BIT(l) :: else fi; l++ }         /* S4 */
    :: else -> break
    od;
    atomic { l = 0; pend = 0 };
    if
    :: batched ->
       staged = staged | batched;
       do
       :: l < PAGES -> d_step { if :: batched & BIT(l) -> dirty[l] = false :: else fi; l++ }
       :: else -> break
       od;
       atomic {                                                /* S3 */
           for (l : 0 .. PAGES - 1) { if :: batched & BIT(l) -> generation[l]++ :: else fi }
           l = 0; batched = 0
       };
       grace();
       publish()
    :: else
    fi
}

proctype Owner()
{
    byte pend, taken, batched, l, d, j, sample[DEVICES];
    bool restarted;
again:
    {
        if
        :: restarted ->
           advance_all(); grace(); publish();
           if :: tracking -> pend = ALL_LINES :: else fi
        :: else
        fi;
        if :: !replied -> enable() :: else fi;
end:
        do
        :: table || pend -> pass()
        :: DIED(0) -> bury(0)
        :: asked ->
           grace(); pass();
           assert(!need[0] && !need[PAGES - 1]); break
        od
    } unless {
        atomic {
            killed -> killed = false; restarted = true;
            pend = 0; taken = 0; batched = 0; l = 0; j = 0;
            for (d : 0 .. DEVICES - 1) { sample[d] = 0; gone[d] = false }
            d = 0; goto again
        }
    }
}

#if DEATHS
active proctype Death()
{
    d_step { dead[0] = true; behind[0] = false; at[0] = 0 }
}
#endif

init
{
    byte i;
    atomic {
        if :: dirty[0] = true :: skip fi;
        for (i : 0 .. DEVICES - 1) { run Device(i) }
        i = 0;
        run Owner()
    };
    d_step {
        replied -> asked = true;
        for (i : 0 .. PAGES - 1) { need[i] = owed[i] }
        i = 0
    }
}
