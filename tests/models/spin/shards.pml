/* Two shards under one top table: each leaf belongs to another owner, and so does its summary word.
 * SUMMARY_SHARED: one word for both; an owner masks away what does not exist for it. */
#define PAGES 2
#define DEVICES 1
#ifdef SUMMARY_SHARED
#define WORD(p) 0
#else
#define WORD(p) p
#endif

#include "order.inc"
#include "ghost.inc"

bool dirty[PAGES], table[PAGES];
byte lines[PAGES], cell, asked;

proctype Device()
{
    byte writes = 2;
    do
    :: writes == 0 -> break
    :: atomic { writes > 0 -> writes--; if :: at[0] = 0 :: at[0] = 1 fi; cell++ };     /* S3 */
       dirty[at[0]] = true;                                    /* S4 */
       lines[WORD(at[0])] = lines[WORD(at[0])] | BIT(at[0]);   /* S4 */
       table[WORD(at[0])] = true;                              /* S4 */
       behind[0] = true;
       d_step { cell++; complete(0) }                          /* S1 */
    od
}

inline grace()
{
    sample = cell;                                             /* S3 */
    sample % 2 == 0 || cell != sample;                         /* S1 */
    sample = 0
}

inline pass(w)
{
    d_step { pend = pend | table[WORD(w)]; table[WORD(w)] = false };               /* S4 */
    if :: pend -> d_step { taken = lines[WORD(w)] & BIT(w); lines[WORD(w)] = 0 } :: else fi;       /* S4 */
    if
    :: taken && dirty[w] -> dirty[w] = false; grace(); atomic { copy(w) }
    :: else
    fi;
    atomic { pend = 0; taken = 0 }
}

proctype Owner(byte w)
{
    byte pend, taken, sample, j;
end:
    do
    :: table[WORD(w)] -> pass(w)
    :: asked & BIT(w) -> grace(); pass(w); assert(!need[w]); break
    od
}

init
{
    atomic { run Device(); run Owner(0); run Owner(1) };
    d_step { asked = 3; need[0] = owed[0]; need[1] = owed[1] }
}
