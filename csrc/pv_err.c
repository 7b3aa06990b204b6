/* pv_err.c - names of the error codes. Nothing else knows them as text; messages for people are made in Python. */
#include "pv_int.h"

#define NAME(code)                                                                                                     \
    case code:                                                                                                         \
        return #code

const char *pv_err_name(int code) {
    switch (code) {
        NAME(PV_OK);
        NAME(PV_ESYS);
        NAME(PV_ENOMEM);
        NAME(PV_EINVAL);
        NAME(PV_EEOF);
        NAME(PV_ENOTFOUND);
        NAME(PV_EDELETED);
        NAME(PV_ECOOKIE);
        NAME(PV_ECRC);
        NAME(PV_ESIZE);
        NAME(PV_ECORRUPT);
        NAME(PV_EVERSION);
        NAME(PV_ECLOSED);
        NAME(PV_EREADONLY);
        NAME(PV_EFULL);
        NAME(PV_EBUFFER);
        NAME(PV_ERANGE);
        NAME(PV_EEXISTS);
        NAME(PV_EPARSE);
        NAME(PV_EMETA);
        NAME(PV_EID);
        NAME(PV_EALIGN);
        NAME(PV_ESTALE);
        NAME(PV_EMORE);
    default:
        return "PV_E?";
    }
}
