/* Devices write, the walker sweeps, the VMM copies and asks for a sync.
 * DEATHS: devices that die, at any step. KILLS: how often the service does. */
#ifndef WRITES
#define WRITES 2           /* of device 0; each other one makes one */
#endif
#ifndef DEATHS
#define DEATHS 0
#endif
#define WALKER DEVICES     /* its store buffer */

#include "order.inc"
#include "kill.inc"
#include "ghost.inc"
#include "ring.inc"
#include "section.inc"


proctype Device(byte d)
{
    byte g, tag[PAGES], writes = (d == 0 -> WRITES : 1);
    bool mine;
    {
        do
        :: writes == 0 -> break
        :: atomic {
               writes > 0 -> writes--;
               if :: at[d] = 0 :: d == 0 -> at[d] = PAGES - 1 fi;  /* pages are alike */
               enter(d)
           };
           g = generation[at[d]];                              /* S3 */
           if
#ifdef IOTLB_ACROSS_REGIONS
           :: tag[0] == g || tag[1] == g
#else
           :: tag[at[d]] == g                                  /* D was set by us: write freely */
#endif
           :: else ->
              mark(d, LEAF(at[d]));
#ifdef TAG_AFTER_WALK
              tag[at[d]] = generation[at[d]]
#else
              tag[at[d]] = g
#endif
           fi;
           write_data(d);
           atomic { leave(d); at[d] = 0; g = 0; mine = false }
        od
    } unless {
        atomic { dead[d] -> g = 0; tag[0] = 0; tag[PAGES - 1] = 0; mine = false; writes = 0 }
    }
}

/* One batch of a pass over the lines in `pend`. */
inline batch()
{
    d_step { ahead = 0; batched = 0; left = 0; l = 0 };
    do
    :: l < LEAVES ->
       d_step {                                                /* S4 */
           if
           :: (pend & BIT(LINE(l))) && SEEN_DIRTY(l) ->
              if
              :: ROOM_FOR_RUN(ahead) -> ring[staged + ahead] = l; ahead++; batched = batched | BIT(l)
              :: else -> left = left | BIT(LINE(l))
              fi
           :: else
           fi;
           l++
       }
    :: else -> break
    od;
#ifdef SUMMARY_WEAK_WALKER
    DRAINED(WALKER);
#endif
    atomic { pend = left; left = 0; l = 0 };
    if
    :: batched ->
#ifdef CLEAR_BEFORE_STAGE
       clear();
       stage();
#else
       stage();
       clear();
#endif
#ifdef PUBLISH_BEFORE_ADVANCE
       publish();
#endif
#ifdef SAMPLE_BEFORE_ADVANCE
       sample_cells();
#endif
       invalidate();
#ifndef SAMPLE_BEFORE_ADVANCE
       sample_cells();
#endif
#ifndef NO_GRACE
       wait_cells();
#endif
#ifdef ADVANCE_PLAIN
       DRAINED(WALKER);
#endif
       publish()
    :: else
    fi
}

inline stage()
{
    d_step { staged = staged + ahead; ahead = 0 }              /* R2 */
}

inline clear()
{
    do
    :: l < LEAVES -> d_step { if :: batched & BIT(l) -> dirty[l] = false :: else fi; l++ }
    :: else -> l = 0; break
    od
}

/* Advances the generations of all regions that the leaves overlap. */
inline invalidate()
{
    do
    :: l < PAGES -> if :: batched & BIT(LEAF(l)) -> advance(l) :: else fi; l++
    :: else -> d_step { l = 0; batched = 0 }; break
    od
}

/* What a new worker does before it answers anybody. */
inline recover()
{
#ifndef RESTART_WITHOUT_ADVANCE
    batched = BIT(LEAVES) - 1;
    invalidate();
#endif
    sample_cells();
#ifndef RESTART_WITHOUT_GRACE
    wait_cells();
#endif
    publish();                                                 /* [head, staged) */
#ifndef RESTART_WITHOUT_SCAN
    pend = ALL_LINES
#endif
}

proctype Walker()
{
    byte pend, taken, left, batched, ahead, l, d, sample[DEVICES];
    bool restarted, answered;
again:
    {
        if :: restarted -> recover() :: else fi;
end:    do
        :: table || pend -> take(); batch()
        :: asked && !answered ->
#ifndef NO_LEADING_GRACE
           grace();
#endif
           take();
           do
           :: pend -> batch()
           :: else -> break
           od;
           put_marker(SYNC);
           answered = true
        :: dead[0] && !gone[0] -> bury(0)
        :: DEVICES > 1 && dead[DEVICES - 1] && !gone[DEVICES - 1] -> bury(DEVICES - 1)
        od
    } unless {
        atomic {
            killed -> killed = false; restarted = true;
            pend = 0; taken = 0; left = 0; batched = 0; ahead = 0; l = 0; answered = false;
            for (d : 0 .. DEVICES - 1) { sample[d] = 0; gone[d] = false }
            d = 0; goto again
        }
    }
}

proctype Vmm()
{
    byte entry, i, j;
    bool requested;
end:
    do
    :: atomic {
           head > 0 -> release(entry);                         /* R3 */
           if
           :: entry == SYNC -> assert(!asked || !(need[0] || need[PAGES - 1])); asked = false
           :: else -> for (i : 0 .. PAGES - 1) { if :: LEAF(i) == entry -> copy(i) :: else fi }
           fi;
           entry = 0; i = 0
       }
    :: d_step {
           !requested -> requested = true; asked = true;
           for (i : 0 .. PAGES - 1) { need[i] = owed[i] }
           i = 0
       }
    od
}

#if DEATHS
active proctype Death()
{
    byte deaths = DEATHS, d;
end:
    do
    :: atomic {
           deaths > 0 -> deaths--;
           if :: d = 0 :: d = DEVICES - 1 fi;
           dead[d] = true; behind[d] = false; at[d] = 0; d = 0
       }
    od
}
#endif

#ifdef LATE
proctype Drain(byte i)
{
end:
    do
    :: d_step {
           IS_LATE(i) ->
#if defined(SECTION_RELEASE)
           cell[i]++;
#elif defined(LEAVE_RELAXED)
           skip;                                               /* here the data lands */
#elif defined(SUMMARY_WEAK_DEVICE)
           unseen = 0;
#elif defined(SUMMARY_WEAK_WALKER)
           stale_lines = 0; stale_table = false;
#elif defined(ADVANCE_PLAIN)
           generation[late_region]++;
#endif
           late = late & ~BIT(i)
       }
    od
}
#endif
init
{
    byte i;
    atomic {
#ifdef LARGE
        generation[1] = 2;                                     /* regions are advanced each by itself */
#endif
        for (i : 0 .. DEVICES - 1) { run Device(i) }
        run Walker(); run Vmm();
#ifdef LATE
        for (i : 0 .. WALKER) { run Drain(i) }
#endif
    }
}
