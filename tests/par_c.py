import torch, torch.distributed as dist, time
from tiny_moe import *
from moe.parallel import *
from moe.experts import ExpertLora
from moe.router import RouterOptions
from finetune.engine import *
from finetune.resident import make_resident
from finetune.recompute import set_recompute
from benchmarks.collectives import CollectiveCounter
from deepspeed.utils import safe_get_full_grad
ids=torch.randint(0,160,(8,24),generator=torch.Generator().manual_seed(1))
def main(rank,world,layouts):
    start_distributed()
    out={}
    ref=None
    for ep,resident,rec in layouts:
        t=time.time()
        m=vl_model()
        m.requires_grad_(False)
        L=replace_moe_blocks(m,ep_size=ep,options=LayerOptions(experts="lora",lora=ExpertLora(r=4,alpha=8),router=RouterOptions(mode="full"),resident=resident,seed=3))
        for l in L: l.experts.init_lora(b_std=0.05)
        if resident: make_resident(m)
        e=initialize(m,EngineOptions(dtype="float32",lr=1e-3,eps=1e-6,clip_norm=0.05,persistence_threshold=0 if not resident else 10**6))
        set_recompute(m,rec); m.train()
        tot=8*23; losses=[]
        mb=ids.chunk(world)[rank]
        for s in range(3):
            with CollectiveCounter() as c:
                logits=e(input_ids=mb,use_cache=False).logits
                loss=torch.nn.functional.cross_entropy(logits[:,:-1].flatten(0,1),mb[:,1:].flatten(),reduction="sum")
                backward(e,loss,tot)
            if s==0: g={n:safe_get_full_grad(p) for n,p in m.named_parameters() if p.requires_grad}
            e.step();
            require_step_applied(e,s)
            loss=loss.detach(); dist.all_reduce(loss); losses.append((round(loss.item()/tot,6), round(float(e.get_global_grad_norm()),6)))
        err=0
        if rec=="none": ref=g
        else: err=max((g[n]-ref[n]).abs().max()/ref[n].abs().max() for n in g)
        out[ep,resident,rec]=losses, round(time.time()-t,1), float(err), [(k.collective,k.ranks,k.dtype,v,c.bytes[k]) for k,v in sorted(c.calls.items())]
        e.destroy()
    return out
if __name__=="__main__":
    from ranks import run_ranks
    for w,lay in ((2,[(2,True,"none"),(2,True,"layer"),(2,True,"selective"),(2,False,"none"),(2,False,"layer"),(2,False,"selective")]),):
        t=time.time()
        for k,v in run_ranks(main,w,lay,timeout=120)[0].items(): print(w,k,*v,sep="\n   ")
        print(time.time()-t)
