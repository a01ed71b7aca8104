/* In place of CANN's shared libraries: what torch_npu links against, so that its real wheel loads on any machine.
 *
 * Only names and arguments of CANN's public documentation; a device's memory is the host's, and nothing is computed.
 *
 * STAND_IN_DEVICES  how many devices there are (none)
 * STAND_IN_SOC      what they are called (Ascend910B1)
 * STAND_IN_MEMORY   bytes that each has (4 GiB): more is refused
 * STAND_IN_SHARED   a file of 8 bytes in which processes on one card count what they use together; what one has not given
 *                   back when it ends is given back then
 * STAND_IN_FAILS    an error code that waiting for a device then gives, as of one that is dying
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#define OK 0
#define E_PARAM 107000
#define E_NODEV 107002
#define API __attribute__((visibility("default")))
typedef int aclError; typedef void *vp;

static uint32_t ndev(void){ const char *s=getenv("STAND_IN_DEVICES"); return s?(uint32_t)atoi(s):0; }
static size_t total(void){ const char *s=getenv("STAND_IN_MEMORY"); return s?strtoull(s,0,10):((size_t)4<<30); }
static __thread int cur=-1; static __thread vp curctx=0; static size_t own=0;
static size_t *of_all(void){
  static size_t *at=0; const char *s=getenv("STAND_IN_SHARED");
  if(at) return at;
  int f=s?open(s,O_RDWR):-1;
  vp p=f<0?MAP_FAILED:mmap(0,sizeof(size_t),PROT_READ|PROT_WRITE,MAP_SHARED,f,0);
  return at=p==MAP_FAILED?&own:p;
}
static void count(size_t n){ size_t*all=of_all(); __atomic_add_fetch(all,n,__ATOMIC_SEQ_CST); if(all!=&own) __atomic_add_fetch(&own,n,__ATOMIC_SEQ_CST); }
__attribute__((destructor)) static void ends(void){ count(-own); }
static int ctxs[64];

API aclError aclInit(const char *p){(void)p;return OK;}
API aclError aclFinalize(void){return OK;}
API const char *aclGetRecentErrMsg(void){return "stand-in for CANN";}
API const char *aclrtGetSocName(void){const char*s=getenv("STAND_IN_SOC");return s?s:"Ascend910B1";}
API aclError aclrtGetDeviceCount(uint32_t*n){*n=ndev();return OK;}
API aclError aclrtSetDevice(int32_t d){ if((uint32_t)d>=ndev())return E_NODEV; cur=d; curctx=&ctxs[d]; return OK;}
API aclError aclrtGetDevice(int32_t*d){ if(cur<0)return E_NODEV; *d=cur; return OK;}
API aclError aclrtResetDevice(int32_t d){(void)d;cur=-1;return OK;}
API aclError aclrtGetCurrentContext(vp*c){ if(!curctx)return E_NODEV; *c=curctx;return OK;}
API aclError aclrtSetCurrentContext(vp c){curctx=c; if(c) cur=(int)((int*)c-ctxs); return OK;}
API aclError aclrtDeviceCanAccessPeer(int32_t*r,int32_t a,int32_t b){(void)a;(void)b;*r=1;return OK;}
API aclError aclrtDeviceEnablePeerAccess(int32_t a,uint32_t f){(void)a;(void)f;return OK;}
API aclError aclrtDeviceGetBareTgid(int32_t*p){*p=1;return OK;}
API aclError aclGetDeviceCapability(uint32_t d,int i,int64_t*v){(void)d;(void)i;if(v)*v=0;return OK;}
API aclError aclrtGetMemInfo(int attr,size_t*f,size_t*t){(void)attr;size_t used=*of_all();*t=total();*f=total()>used?total()-used:0;return OK;}

/* The 512 bytes before a block say how large it is. */
API aclError aclrtMalloc(vp*p,size_t n,int pol){
  (void)pol; if(*of_all()+n>total()) return 207001;
  char*b; if(posix_memalign((vp*)&b,512,n+1024)) return 207001;
  *(size_t*)b=n; count(n); *p=b+512; return OK;
}
API aclError aclrtMallocAlign32(vp*p,size_t n,int pol){return aclrtMalloc(p,n,pol);}
API aclError aclrtFree(vp p){char*b=(char*)p-512; count(-*(size_t*)b); free(b); return OK;}

static int failing(void){const char*s=getenv("STAND_IN_FAILS"); return s?atoi(s):OK;}
API aclError aclrtMallocHost(vp*p,size_t n){return posix_memalign(p,512,n?n:1)?207000:OK;}
API aclError aclrtFreeHost(vp p){free(p);return OK;}
API aclError aclrtMemcpy(vp d,size_t m,const void*s,size_t n,int k){(void)k;if(n>m)return E_PARAM;memmove(d,s,n);return OK;}
API aclError aclrtMemcpyAsync(vp d,size_t m,const void*s,size_t n,int k,vp st){(void)st;return aclrtMemcpy(d,m,s,n,k);}
API aclError aclrtMemset(vp d,size_t m,int32_t v,size_t n){if(n>m)return E_PARAM;memset(d,v,n);return OK;}
API aclError aclrtMemsetAsync(vp d,size_t m,int32_t v,size_t n,vp s){(void)s;return aclrtMemset(d,m,v,n);}

API aclError aclrtCreateStream(vp*s){*s=malloc(8);return OK;}
API aclError aclrtCreateStreamWithConfig(vp*s,uint32_t p,uint32_t f){(void)p;(void)f;return aclrtCreateStream(s);}
API aclError aclrtDestroyStream(vp s){free(s);return OK;}
API aclError aclrtSynchronizeStream(vp s){(void)s;return failing();}
API aclError aclrtSynchronizeStreamWithTimeout(vp s,int32_t t){(void)s;(void)t;return failing();}
API aclError aclrtSynchronizeDevice(void){return failing();}
API aclError aclrtSynchronizeDeviceWithTimeout(int32_t t){(void)t;return failing();}
API aclError aclrtStreamQuery(vp s,int*st){(void)s;*st=0;return OK;}
API aclError aclrtStreamGetId(vp s,int32_t*id){(void)s;*id=0;return OK;}
API aclError aclrtCreateEventExWithFlag(vp*e,uint32_t f){(void)f;*e=malloc(8);return OK;}
API aclError aclrtCreateEventWithFlag(vp*e,uint32_t f){return aclrtCreateEventExWithFlag(e,f);}
API aclError aclrtDestroyEvent(vp e){free(e);return OK;}
API aclError aclrtRecordEvent(vp e,vp s){(void)e;(void)s;return OK;}
API aclError aclrtResetEvent(vp e,vp s){(void)e;(void)s;return OK;}
API aclError aclrtStreamWaitEvent(vp s,vp e){(void)e;(void)s;return OK;}
API aclError aclrtSynchronizeEvent(vp e){(void)e;return failing();}
API aclError aclrtQueryEventStatus(vp e,int*st){(void)e;*st=1;return OK;}
API aclError aclrtQueryEventWaitStatus(vp e,int*st){(void)e;*st=1;return OK;}
API aclError aclrtEventElapsedTime(float*ms,vp a,vp b){(void)a;(void)b;*ms=0.001f;return OK;}
API aclError aclrtSetOpExecuteTimeOut(uint32_t t){(void)t;return OK;}
API aclError aclrtPeekAtLastError(int l){(void)l;return OK;}
API aclError aclrtGetLastError(int l){(void)l;return OK;}

#define NOTSUP(n) API aclError n(void){return 207000;}   /* "feature not supported" */
NOTSUP(aclrtReserveMemAddress) NOTSUP(aclrtReleaseMemAddress) NOTSUP(aclrtMallocPhysical)
NOTSUP(aclrtFreePhysical) NOTSUP(aclrtMapMem) NOTSUP(aclrtUnmapMem)
NOTSUP(aclrtMemExportToShareableHandle) NOTSUP(aclrtMemImportFromShareableHandle)
NOTSUP(aclrtMemSetPidToShareableHandle) NOTSUP(aclrtBinaryGetFunction)
NOTSUP(aclrtBinaryLoadFromData) NOTSUP(aclrtGetFunctionAddr)
NOTSUP(rtDevBinaryRegister) NOTSUP(rtFunctionRegister) NOTSUP(rtGetC2cCtrlAddr) NOTSUP(rtKernelLaunch)
#define NOP(n) API aclError n(void){return OK;}
NOP(aclopCompileAndExecute) NOP(aclopCompileAndExecuteV2) NOP(aclrtProcessReport) NOP(aclAppLog)
NOP(aclmdlInitDump) NOP(aclmdlSetDump) NOP(aclmdlFinalizeDump)
NOP(aclopDestroyAttr) NOP(aclopSetAttrBool) NOP(aclopSetAttrDataType) NOP(aclopSetAttrFloat)
NOP(aclopSetAttrInt) NOP(aclopSetAttrListBool) NOP(aclopSetAttrListFloat) NOP(aclopSetAttrListInt)
NOP(aclopSetAttrListListInt) NOP(aclopSetAttrString)
NOP(aclDestroyDataBuffer) NOP(aclDestroyTensorDesc) NOP(aclSetTensorDescName) NOP(aclSetTensorFormat)
NOP(aclSetTensorPlaceMent) NOP(aclSetTensorShape)
NOP(aclGetTensorDescDimV2) NOP(aclGetTensorDescFormat) NOP(aclGetTensorDescNumDims) NOP(aclGetTensorDescType)
NOP(MsprofGetHashId) NOP(MsprofRegisterCallback) NOP(MsprofReportAdditionalInfo)
NOP(MsprofReportApi) NOP(MsprofReportCompactInfo) NOP(MsprofSysCycleTime)
/* looked up with dlsym at first device use */
NOP(aclrtSetDeviceSatMode) NOP(aclrtSetSysParamOpt) NOP(aclrtCtxSetSysParamOpt)
NOP(aclrtSetStreamFailureMode) NOP(aclrtSetStreamOverflowSwitch) NOP(aclrtSetStreamAttribute)
NOP(aclrtSetOpWaitTimeout) NOP(aclrtSetOpExecuteTimeOutV2) NOP(aclrtDestroyStreamForce)
NOP(aclrtHostUnregister) NOP(aclrtLaunchCallback) NOP(aclrtSubscribeReport) NOP(aclrtUnSubscribeReport)
API aclError aclrtGetDeviceSatMode(int*m){*m=1;return OK;}
API aclError aclrtGetStreamOverflowSwitch(vp s,uint32_t*f){(void)s;*f=0;return OK;}
API aclError aclrtGetPrimaryCtxState(int32_t d,uint32_t*f,int32_t*a){(void)d;if(f)*f=0;*a=(cur>=0);return OK;}
API const char *aclrtGetErrorVerbose(int d,vp i){(void)d;(void)i;return "";}
API aclError aclrtGetSysParamOpt(int o,int64_t*v){(void)o;if(v)*v=0;return OK;}
NOP(aclSetCompileopt) NOP(aclopSetCompileFlag)
API size_t aclGetCompileoptSize(int o){(void)o;return 16;}
API aclError aclGetCompileopt(int o,char*v,size_t n){(void)o;if(v&&n)v[0]=0;return OK;}
API vp aclopCreateAttr(void){return malloc(8);}
API vp aclCreateDataBuffer(vp a,size_t n){(void)a;(void)n;return malloc(8);}
API vp aclCreateTensorDesc(int t,int n,const int64_t*d,int f){(void)t;(void)n;(void)d;(void)f;return malloc(8);}
