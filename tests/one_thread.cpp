// Linked into the tests that TSan does not run, since they have one thread: whoever starts another there is told.
#include <gtest/gtest.h>

#include <pthread.h>

#include <cstdio>
#include <cstdlib>
#include <thread>

// Before that of libc, and of a sanitizer.
extern "C" int pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *)
{
    std::fputs("a test that is declared ONE_THREAD starts a second\n", stderr);
    std::abort();
}

TEST(OneThread, IsHeldToThat)
{
    EXPECT_DEATH(std::thread([] {}).join(), "declared ONE_THREAD");
}
