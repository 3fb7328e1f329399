/* Enabling (S7): clean, arm, advance, grace, reply. Before it devices write freely and leave D alone; D may be left from an
 * earlier time. When the VMM has the reply it copies everything once; from there on the ring must tell it. */
#define DEVICES 1
#define PAGES 1
#ifndef WRITES
#define WRITES 3
#endif

#include "order.inc"
#include "ghost.inc"
#include "section.inc"

bool tracking, replied;
bool asked;

proctype Device(byte d)
{
    byte g, tag, writes = WRITES;
    bool mine, tracked;
    do
    :: writes == 0 -> break
    :: atomic { writes > 0 -> writes--; enter(d) };
#ifdef TRACKING_BEFORE_GENERATION
       tracked = tracking;
#endif
       g = generation[0];                                      /* S3, S7 */
       if
       :: tag == g
       :: else ->
#ifndef TRACKING_BEFORE_GENERATION
          tracked = tracking;                                  /* S7 */
#endif
          if :: tracked -> mark(d, 0) :: else fi;
          tag = g
       fi;
       write_data(d);
       atomic { leave(d); g = 0; mine = false; tracked = false }
    od
}

inline enable()
{
#if defined(ADVANCE_BEFORE_ARM)
    dirty[0] = false; generation[0]++; tracking = true;
#elif defined(ARM_BEFORE_CLEAN)
    tracking = true; generation[0]++; dirty[0] = false;
#else
#ifndef ENABLE_WITHOUT_CLEAN
    dirty[0] = false;
#endif
    tracking = true;                                           /* S7 */
#ifndef ENABLE_WITHOUT_ADVANCE
    generation[0]++;                                           /* S3 */
#endif
#endif
#ifndef ENABLE_WITHOUT_GRACE
    grace();
#endif
    atomic { replied = true; copy(0) }                         /* the reply, and the VMM's first copy */
}

inline pass()
{
    take();
    if
    :: pend && dirty[0] ->
       dirty[0] = false;
       generation[0]++;                                        /* S3 */
       grace();
       atomic { copy(0) }
    :: else
    fi;
    pend = 0
}

proctype Owner()
{
    byte pend, taken, d, j, sample[DEVICES];
    enable();
end:
    do
    :: table -> pass()
    :: asked -> grace(); pass(); assert(!need[0]); break
    od
}

init
{
    atomic {
        if :: dirty[0] = true :: skip fi;
        run Device(0); run Owner()
    };
    d_step { replied -> asked = true; need[0] = owed[0] }
}
