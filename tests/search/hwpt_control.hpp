// How hwpts come and go: as service/control/requests.cpp, one step of it each time.
#pragma once

#include "tests/search/devices.hpp"
#include "tests/search/service.hpp"
#include "tests/search/vmm.hpp"
#include "tests/search/world.hpp"

#include <set>

namespace dirtyring::search {

class HwptControl
{
  public:
    HwptControl(World &world, Vmm &vmm, Service &service, Devices &devices)
        : world_(world), vmm_(vmm), service_(service), devices_(devices)
    {
    }

    void destroy();    // begins, or gets a step further
    void make();       // another one, where there is none
    void make_large(); // what a shard has wished for is done, and it is told
    void service_died();
    [[nodiscard]] bool destroying() const { return world_.hwpt && world_.hwpt->destroying; }

  private:
    void gone();

    World &world_;
    Vmm &vmm_;
    Service &service_;
    Devices &devices_;
    bool unrouted_ = false;
    std::set<unsigned> cancelled_;
};

} // namespace dirtyring::search
