import importlib.util, numpy as np, pytest
spec=importlib.util.spec_from_file_location("te","/tmp/te.py"); te=importlib.util.module_from_spec(spec)
import sys; sys.modules["te"]=te; spec.loader.exec_module(te)
honest=te.honest; _kept=te._kept; place=te.place
def test_p(honest,in_process_grid,place):
    rng=np.random.default_rng(0)
    s=honest.scripted(); st=s["silo-b"].statistics
    blocks={k:(rng.choice([-3.3e38,3.3e38],size=v.shape).astype(np.float32) if k.startswith("delta") else v*np.float32(1e3)) for k,v in st.blocks.items()}
    s["silo-b"].statistics=te.Statistics(24,st.tokens,blocks)
    plan=honest.plan.override(["privacy.metrics=none"]).pinned(sha256=honest.plan.model.sha256, layout=honest.layout.digest)
    for p in (plan,None):
        try:
            te.exchange(in_process_grid(s),honest,place/f"run{p is None}",plan=p)
            w=te.weights_of(place/f"run{p is None}"); print("INF", sum((~np.isfinite(v)).sum() for v in w.values()), max(np.abs(v).max() for v in w.values()))
        except BaseException as e: print("ERR",type(e),str(e)[:300])
