/* The memory of tables, which comes and goes. A large page holds two granules of a table each. When both are linked,
 * the owner asks the kernel to make it large; the kernel may bring back what was given back meanwhile, so when it is
 * done, the owner gives back again what is not present. KILLS: how often the owner dies. The links outlive it, in
 * its record and in the parents' entries; what is present it kept to itself, and the next one takes what is linked
 * for present.
 *
 * The memory of a table that is linked, or that a device may still walk, is never given back: D and translations
 * would vanish.
 */
#ifndef CHANGES
#define CHANGES 4          /* links and unlinks */
#endif
#ifndef WALKS
#define WALKS 2
#endif
#define TABLES 2
#define NONE 9

#include "order.inc"
#include "kill.inc"

bool recorded[TABLES];     /* linked, in the record */
bool link[TABLES];         /* in the parent's entry */
bool memory[TABLES];       /* is there */
byte cell, walked = NONE;  /* the device's section, and the table that it walks in it */
byte making;               /* large pages asked for, and done but not told: 1, 2 */

proctype Device()
{
    byte walks = WALKS;
    do
    :: walks == 0 -> break
    :: atomic { walks > 0 -> walks--; cell++ };                /* S3 */
       if
       :: atomic { link[0] -> walked = 0 }                     /* S6 */
       :: atomic { link[1] -> walked = 1 }
       :: skip
       fi;
       d_step { assert(walked == NONE || memory[walked]); walked = NONE; cell++ }         /* S1: D is set in it */
    od
}

/* The kernel. The memory is all there, then the owner is told; if that has died, nobody is. */
proctype Kernel()
{
end:
    do
    :: d_step { making == 1 -> memory[0] = true; memory[1] = true; making = 2 }
    od
}

inline give_back(t)
{
    d_step { assert(!recorded[t] && !link[t] && walked != t); memory[t] = false }
}

inline add_table(t)
{
    d_step { memory[t] = true; present[t] = true };
    recorded[t] = true;
    if
    :: recorded[0] && recorded[1] && !large -> d_step { large = true; making = 1 }
    :: else
    fi;
    link[t] = true                                             /* S6 */
}

inline take_table(t)
{
    link[t] = false;
    recorded[t] = false;
#ifdef PRESENT_UNTIL_UNLINKED
    present[t] = false;
#endif
#ifndef GIVEN_BACK_AT_ONCE
    sample = cell;                                             /* S3 */
    do
    :: making == 2 -> made_large()                             /* it may be told meanwhile */
    :: atomic { sample % 2 == 0 || cell != sample -> sample = 0 }; break       /* S1 */
    od;
#endif
    present[t] = false;
    large = false;
    give_back(t)
}

inline made_large()
{
    making = 0;
    if :: !present[0] -> give_back(0) :: else fi;
    if :: !present[1] -> give_back(1) :: else fi
}

proctype Owner()
{
    byte sample, changes = CHANGES;
    bool present[TABLES], large, restarted;
again:
    {
        if
        :: restarted ->
           atomic { if :: making == 2 -> making = 0 :: else fi };
#ifndef PRESENT_FORGOTTEN
           d_step { present[0] = recorded[0]; present[1] = recorded[1] };
#endif
           d_step { link[0] = recorded[0]; link[1] = recorded[1] };
           sample = cell;
           sample % 2 == 0 || cell != sample;
           sample = 0
        :: else
        fi;
end:    do
        :: atomic { changes > 0 && !recorded[0] -> changes-- }; add_table(0)
        :: atomic { changes > 0 && !recorded[1] -> changes-- }; add_table(1)
        :: atomic { changes > 0 && recorded[0] -> changes-- }; take_table(0)
        :: atomic { changes > 0 && recorded[1] -> changes-- }; take_table(1)
        :: making == 2 -> made_large()
        od
    } unless {
        atomic {
            killed -> killed = false; restarted = true;
            sample = 0; present[0] = false; present[1] = false; large = false;
            goto again
        }
    }
}

init
{
    atomic { run Device(); run Kernel(); run Owner() }
}
